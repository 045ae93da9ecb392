"""What the dashboard shows: rows of panels, each a title, a unit and PromQL expressions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelyard.monitor import metrics as m


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the legend of its series (`{{label}}` is replaced by Grafana)."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One graph. `unit` is Grafana's name: s, short, percent, bytes, percentunit, reqps; `width` of 24 columns."""

    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    kind: Literal["timeseries", "stat"] = "timeseries"
    width: int = 8


@dataclass(frozen=True)
class Row:
    """A titled group of panels."""

    title: str
    panels: tuple[Panel, ...]


_CHOSEN = '{recipe=~"$recipe", stage=~"$stage"}'


def _stage(metric: m.Metric, what: str = "") -> Query:
    return Query(f"{metric.name}{_CHOSEN}", f"{{{{recipe}}}}/{{{{stage}}}} {what}".rstrip())


def _quantiles(metric: m.Metric) -> tuple[Query, ...]:
    return tuple(
        Query(f"histogram_quantile({q}, sum by (le) (rate({metric.name}_bucket[5m])))", f"p{q * 100:.0f}")
        for q in (0.5, 0.95, 0.99)
    )


def _rate(metric: m.Metric, by: str) -> tuple[Query, ...]:
    return (Query(f"sum by ({by}) (rate({metric.name}[5m]))", f"{{{{{by}}}}}"),)


TRAINING = Row(
    "Training",
    (
        Panel(
            "Loss", "Nats a token; held-out loss where it was evaluated.", "short",
            (_stage(m.TRAIN_LOSS, "train"), _stage(m.TRAIN_HELDOUT_LOSS, "held out")),
        ),
        Panel("Tokens a second", "All workers together.", "short", (_stage(m.TRAIN_TOKENS_PER_SECOND),)),
        Panel("Gradient norm", "Before clipping; spikes come before diverging loss.", "short",
              (_stage(m.TRAIN_GRADIENT_NORM),)),
        Panel("Learning rate", "Of the last step.", "sci", (_stage(m.TRAIN_LEARNING_RATE),)),
        Panel("Steps", "Optimizer steps done; flat means stalled.", "short", (_stage(m.TRAIN_STEP),)),
        Panel("Waiting for data", "Share of a step that waits for the reader.", "percentunit",
              (_stage(m.TRAIN_DATA_WAIT),)),
    ),
)  # fmt: skip

CURATION = Row(
    "Curation",
    (
        Panel("Documents", "Read and kept by each curate stage.", "short",
              (_stage(m.CURATE_DOCUMENTS_READ, "read"), _stage(m.CURATE_DOCUMENTS_KEPT, "kept")), width=12),
        Panel("Text", "UTF-8 bytes read and kept.", "bytes",
              (_stage(m.CURATE_BYTES_READ, "read"), _stage(m.CURATE_BYTES_KEPT, "kept")), width=12),
    ),
)  # fmt: skip

SERVING = Row(
    "Serving",
    (
        Panel("Requests a second", "By HTTP status.", "reqps", _rate(m.REQUESTS, "code")),
        Panel("Errors a second", "By type of error.", "reqps", _rate(m.ERRORS, "type")),
        Panel("Replicas", "Engine replicas that answer; times in 5 minutes that one did not say how it is.", "short",
              (Query(f"sum({m.REPLICAS.name})", "replicas"), Query(f"sum(increase({m.UNREAD.name}[5m]))", "silent")),
              "stat"),
        Panel("Time to first token", "From arrival.", "s", _quantiles(m.TIME_TO_FIRST_TOKEN)),
        Panel("Time between tokens", "Of one request.", "s", _quantiles(m.INTER_TOKEN)),
        Panel("Queue time", "Before a request's first step.", "s", _quantiles(m.QUEUE)),
        Panel("Tokens a second", "Prompt tokens read and completion tokens written.", "short",
              _rate(m.TOKENS, "direction")),
        Panel("Batch and KV slots", "Requests in the last step, cache slots in use.", "short",
              (Query(f"sum({m.BATCH_OCCUPANCY.name})", "requests in a step"),
               Query(f"sum({m.KV_SLOTS_USED.name})", "KV slots"))),
        Panel("KV memory and prefix hits", "Share of blocks that requests hold; share of prompt tokens found computed.",
              "percentunit", (Query(f"avg({m.KV_USED.name})", "KV blocks held"),
                              Query(f"avg({m.PREFIX_HITS.name})", "prefix hits"))),
        Panel("Response cache", "Cacheable answers a second, kept or computed.", "reqps", _rate(m.CACHE, "result")),
        Panel("Request time", "From arrival to the last byte.", "s", _quantiles(m.REQUEST_SECONDS)),
        Panel("Answers by version", "Requests a second each version answers: canary and A/B.", "reqps",
              _rate(m.REQUESTS, "version")),
        Panel("First token by version", "95th percentile from arrival.", "s",
              (Query(f"histogram_quantile(0.95, sum by (le, version) (rate({m.TIME_TO_FIRST_TOKEN.name}_bucket[5m])))",
                     "{{version}}"),)),
        Panel("Shadow", "Copies answered in the shadow a second, by how they compare.", "reqps",
              _rate(m.SHADOW, "result")),
    ),
)  # fmt: skip

RAY_SERVE = Row(
    "Ray Serve",
    (
        Panel("Healthy replicas", "By deployment, as Serve sees them.", "short",
              (Query("sum by (deployment) (ray_serve_deployment_replica_healthy)", "{{deployment}}"),)),
        Panel("Queued queries", "Waiting for a replica; autoscaling counts them.", "short",
              (Query("sum by (deployment) (ray_serve_deployment_queued_queries)", "{{deployment}}"),)),
        Panel("Processing time p95", "In a replica.", "ms",
              (Query("histogram_quantile(0.95, sum by (le, deployment) "
                     "(rate(ray_serve_deployment_processing_latency_ms_bucket[5m])))", "{{deployment}}"),)),
    ),
)  # fmt: skip

RAY = Row(
    "Ray resources",
    (
        Panel("CPU", "Utilization of each node.", "percent", (Query("ray_node_cpu_utilization", "{{instance}}"),)),
        Panel("Memory", "Used share of each node's RAM.", "percentunit",
              (Query("ray_node_mem_used / ray_node_mem_total", "{{instance}}"),)),
        Panel("Object store", "Bytes by location; SPILLED means it was too small.", "bytes",
              (Query("sum by (Location) (ray_object_store_memory)", "{{Location}}"),)),
        Panel("GPU", "Utilization of each GPU.", "percent",
              (Query("ray_node_gpus_utilization", "{{instance}} {{GpuIndex}}"),)),
        Panel("GPU memory", "Used share.", "percentunit",
              (Query("ray_node_gram_used / (ray_node_gram_used + ray_node_gram_available)",
                     "{{instance}} {{GpuIndex}}"),)),
        Panel("Disk", "Used share of each node's disk.", "percentunit",
              (Query("ray_node_disk_usage / (ray_node_disk_usage + ray_node_disk_free)", "{{instance}}"),)),
        Panel("Tasks", "By state.", "short", (Query("sum by (State) (ray_tasks)", "{{State}}"),), width=12),
        Panel("Actors", "By state.", "short", (Query("sum by (State) (ray_actors)", "{{State}}"),), width=12),
    ),
)  # fmt: skip

ROWS = (TRAINING, CURATION, SERVING, RAY_SERVE, RAY)
