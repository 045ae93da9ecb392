"""Prometheus rules: ratios and quantiles recorded once, and alerts that say what to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from modelyard.monitor import metrics as m
from modelyard.monitor.panels import ROWS


@dataclass(frozen=True)
class Alert:
    """One alert.

    Attributes:
        name: alert name.
        expr: PromQL, true when something is wrong.
        for_: how long it must stay true, such as `5m`.
        severity: `page` (users notice) or `ticket` (somebody should look today).
        summary: one sentence, may hold `{{ $labels.x }}` and `{{ $value }}`.
        mend: what to do.
    """

    name: str
    expr: str
    for_: str
    severity: str
    summary: str
    mend: str


REQUEST_RATE = "modelyard:requests:rate5m"
ERROR_RATIO = "modelyard:request_errors:ratio_rate5m"
FIRST_TOKEN_P95 = "modelyard:time_to_first_token_seconds:p95_5m"  # noqa: S105 - a rule's name
NEXT_TOKEN_P95 = "modelyard:inter_token_seconds:p95_5m"  # noqa: S105 - a rule's name
QUEUE_P95 = "modelyard:queue_seconds:p95_5m"


def _p95(metric: m.Metric) -> str:
    return f"histogram_quantile(0.95, sum by (le) (rate({metric.name}_bucket[5m])))"


RECORDED = {
    REQUEST_RATE: f"sum(rate({m.REQUESTS.name}[5m]))",
    ERROR_RATIO: f'(sum(rate({m.REQUESTS.name}{{code=~"5.."}}[5m])) or vector(0)) / sum(rate({m.REQUESTS.name}[5m]))',
    FIRST_TOKEN_P95: _p95(m.TIME_TO_FIRST_TOKEN),
    NEXT_TOKEN_P95: _p95(m.INTER_TOKEN),
    QUEUE_P95: _p95(m.QUEUE),
}
"""Name -> expression of every recording rule."""

ALERTS = (
    Alert(
        "ModelyardErrors", f"{ERROR_RATIO} > 0.05", "5m", "page",
        "{{ $value | humanizePercentage }} of requests fail on the server's side.",
        "Look at the errors panel by type and at the replicas' logs; roll back if a version is new.",
    ),
    Alert(
        "ModelyardSlowFirstToken", f"{FIRST_TOKEN_P95} > 2", "10m", "page",
        "The 95th percentile of the time to the first token is {{ $value | humanizeDuration }}.",
        "Raise max_replicas, or shorten prompts: look at queue time and KV slots.",
    ),
    Alert(
        "ModelyardQueueing", f"{QUEUE_P95} > 1", "10m", "ticket",
        "Requests wait {{ $value | humanizeDuration }} (95th percentile) before their first step.",
        "Raise max_replicas or the nodes' maximum in cluster.yaml.",
    ),
    Alert(
        "ModelyardNoReplicas", f"sum({m.REPLICAS.name}) == 0 and on () {REQUEST_RATE} > 0", "2m", "page",
        "Requests arrive and no replica answers.",
        "Look at `serve status` and at the deployment's logs; a node may lack memory.",
    ),
    Alert(
        "ModelyardTrainingStalled",
        f"changes({m.TRAIN_STEP.name}[15m]) == 0 and {m.TRAIN_STEP.name} offset 15m", "5m", "ticket",
        "{{ $labels.recipe }}/{{ $labels.stage }} has made no step for 15 minutes.",
        "Look for a lost worker or a hung collective in the Ray dashboard; a rerun resumes from the checkpoint.",
    ),
    Alert(
        "ModelyardLossNotFinite", f"{m.TRAIN_LOSS.name} != {m.TRAIN_LOSS.name}", "1m", "ticket",
        "The loss of {{ $labels.recipe }}/{{ $labels.stage }} is not a number.",
        "Lower the learning rate or clip harder, and resume from an earlier checkpoint.",
    ),
    Alert(
        "ModelyardInputBound", f"{m.TRAIN_DATA_WAIT.name} > 0.3", "15m", "ticket",
        "{{ $labels.recipe }}/{{ $labels.stage }} waits for data {{ $value | humanizePercentage }} of the time.",
        "Put the token shards nearer to the workers.",
    ),
    Alert(
        "RayNodeMemory", "ray_node_mem_used / ray_node_mem_total > 0.92", "5m", "page",
        "{{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory; Ray kills workers at 95 %.",
        "Give the stage more memory_per_worker or fewer workers a node.",
    ),
    Alert(
        "RayNodeDisk", "ray_node_disk_free / (ray_node_disk_usage + ray_node_disk_free) < 0.08", "5m", "ticket",
        "{{ $labels.instance }} has {{ $value | humanizePercentage }} of its disk left; Ray stops spilling at 5 %.",
        "Run `modelyard gc`, or give the node a larger disk.",
    ),
    Alert(
        "RayServeUnhealthy", "sum by (deployment) (ray_serve_deployment_replica_healthy == bool 0) > 0", "3m", "page",
        "{{ $value }} replicas of {{ $labels.deployment }} fail their health check.",
        "Look at the replica's log in the Ray dashboard.",
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    """The rules file as plain values."""
    recording = [{"record": name, "expr": expr} for name, expr in RECORDED.items()]
    alerting = [
        {
            "alert": a.name, "expr": a.expr, "for": a.for_, "labels": {"severity": a.severity},
            "annotations": {"summary": a.summary, "description": a.mend},
        }
        for a in ALERTS
    ]  # fmt: skip
    return {"groups": [{"name": "modelyard-recorded", "rules": recording}, {"name": "modelyard", "rules": alerting}]}


def panel_expressions() -> list[str]:
    """Every PromQL expression of the dashboard, so that promtool can check them as rules."""
    return [query.expr for row in ROWS for panel in row.panels for query in panel.queries]
