"""The checked-in files equal the generated ones, and every expression in them is right."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from modelyard.monitor.dashboards import dashboard, files, main
from modelyard.monitor.metrics import ALL, RAY
from modelyard.monitor.rules import ALERTS, RECORDED, panel_expressions

FOLDER = Path(__file__).parents[2] / "dashboards"
PROMTOOL = shutil.which("promtool")
promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (apt-get install prometheus)")


def all_expressions() -> list[str]:
    return panel_expressions() + list(RECORDED.values()) + [alert.expr for alert in ALERTS]


@pytest.mark.parametrize("name", sorted(files()))
def test_checked_in_files_are_what_the_script_generates(name: str) -> None:
    assert (FOLDER / name).read_text() == files()[name], (
        "run: python -m modelyard.monitor.dashboards --write dashboards/"
    )


def test_the_script_writes_the_files(tmp_path: Path) -> None:
    main(["--write", str(tmp_path / "made")])
    assert sorted(p.name for p in (tmp_path / "made").iterdir()) == sorted(files())


def test_generating_imports_neither_ray_nor_mlflow() -> None:
    code = (
        "import sys, modelyard.monitor.dashboards as d; d.files(); print({'ray', 'mlflow', 'torch'} & set(sys.modules))"
    )
    environment = {"PYTHONPATH": str(FOLDER.parent / "platform"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_every_metric_asked_for_is_one_that_somebody_writes() -> None:
    ours = {series for metric in ALL for series in metric.series} | set(RECORDED)
    for expression in all_expressions():
        found = set(re.findall(r"\b(?:modelyard[_:][a-z0-9_:]+|ray_[a-z0-9_]+)\b", expression))
        assert found, expression
        assert found <= ours | set(RAY), f"{found - ours - set(RAY)} in {expression}"


def test_ray_metrics_exist_in_the_installed_ray() -> None:
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "".join(p.read_text() for p in folder.glob("*.py"))
    assert [name for name in RAY if not re.search(rf"\b{name}\b", text)] == []


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    asked = " ".join(panel_expressions())
    hidden = {"modelyard_train_tokens"}  # its rate is on the dashboard as tokens a second
    assert {m.name for m in ALL if not re.search(rf"\b{m.name}(_bucket)?\b", asked)} == hidden


def test_panels_do_not_overlap_and_have_a_place() -> None:
    taken: set[tuple[int, int]] = set()
    made = dashboard()
    assert len({panel["id"] for panel in made["panels"]}) == len(made["panels"])
    for panel in made["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                 for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
        assert not cells & taken, panel["title"]
        taken |= cells
    assert json.loads(files()["modelyard.json"]) == made


def check(path: Path, *command: str) -> None:
    done = subprocess.run([str(PROMTOOL), *command, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@promtool
def test_promtool_accepts_the_rules() -> None:
    check(FOLDER / "prometheus-rules.yaml", "check", "rules")


@promtool
def test_promtool_accepts_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": e} for i, e in enumerate(panel_expressions())]
    (tmp_path / "panels.yaml").write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    check(tmp_path / "panels.yaml", "check", "rules")


def series(name: str, values: str) -> dict[str, str]:
    return {"series": name, "values": values}


def answers(code: int, values: str) -> list[dict[str, str]]:
    return [series(f'modelyard_requests_total{{code="{code}"}}', values)]


# Alert -> (time of the look, series that fire it, labels of the alert, series that must not).
SCENES = {
    "ModelyardErrors": (
        "20m",
        answers(200, "0+90x40") + answers(500, "0+10x40"),
        {},
        answers(200, "0+99x40") + answers(500, "0+1x40"),
    ),
    "ModelyardSlowFirstToken": (
        "30m",
        [series('modelyard_time_to_first_token_seconds_bucket{le="1"}', "0+0x40"),
         series('modelyard_time_to_first_token_seconds_bucket{le="6"}', "0+9x40"),
         series('modelyard_time_to_first_token_seconds_bucket{le="+Inf"}', "0+9x40")],
        {},
        [series('modelyard_time_to_first_token_seconds_bucket{le="1"}', "0+9x40"),
         series('modelyard_time_to_first_token_seconds_bucket{le="+Inf"}', "0+9x40")],
    ),
    "ModelyardNoReplicas": (
        "20m",
        [series("modelyard_replicas", "0x40"), series('modelyard_requests_total{code="503"}', "0+5x40")],
        {},
        [series("modelyard_replicas", "0x40"), series('modelyard_requests_total{code="503"}', "5x40")],
    ),
    "ModelyardTrainingStalled": (
        "40m",
        [series('modelyard_train_step{recipe="r",stage="s"}', "0+1x10 10x40")],
        {"recipe": "r", "stage": "s"},
        [series('modelyard_train_step{recipe="r",stage="s"}', "_x32 5x20")],  # has only just started
    ),
    "ModelyardLossNotFinite": (
        "10m",
        [series('modelyard_train_loss{recipe="r",stage="s"}', "2" + " NaN" * 20)],
        {"recipe": "r", "stage": "s"},
        [series('modelyard_train_loss{recipe="r",stage="s"}', "2x20")],
    ),
    "RayNodeMemory": (
        "10m",
        [series('ray_node_mem_used{instance="a"}', "95x20"), series('ray_node_mem_total{instance="a"}', "100x20")],
        {"instance": "a"},
        [series('ray_node_mem_used{instance="a"}', "50x20"), series('ray_node_mem_total{instance="a"}', "100x20")],
    ),
    "RayNodeDisk": (
        "10m",
        [series('ray_node_disk_free{instance="a"}', "5x20"), series('ray_node_disk_usage{instance="a"}', "95x20")],
        {"instance": "a"},
        [series('ray_node_disk_free{instance="a"}', "50x20"), series('ray_node_disk_usage{instance="a"}', "50x20")],
    ),
    "RayServeUnhealthy": (
        "10m",
        [series('ray_serve_deployment_replica_healthy{deployment="d",replica="1"}', "0x20"),
         series('ray_serve_deployment_replica_healthy{deployment="d",replica="2"}', "1x20")],
        {"deployment": "d"},
        [series('ray_serve_deployment_replica_healthy{deployment="d",replica="2"}', "1x20")],
    ),
}  # fmt: skip


def fires(
    rules: Path, folder: Path, alert: str, at: str, given: list[dict[str, str]], labels: dict[str, str] | None
) -> None:
    """Lets promtool play `given` and asserts that the alert fires with `labels`, or not at all (None)."""
    text = yaml.safe_load(rules.read_text())
    found = next(r for group in text["groups"] for r in group["rules"] if r.get("alert") == alert)
    expected = [] if labels is None else [{"exp_labels": {**found["labels"], **labels}}]
    test = {
        "interval": "1m",
        "input_series": given,
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
    }
    # promtool compares annotations too; what they say is not the point here.
    bare = json.loads(json.dumps(text))
    for group in bare["groups"]:
        for rule in group["rules"]:
            rule.pop("annotations", None)
    (folder / "rules.yaml").write_text(yaml.safe_dump(bare))
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": [str(folder / "rules.yaml")], "evaluation_interval": "1m", "tests": [test]})
    )
    check(folder / "test.yaml", "test", "rules")


@promtool
@pytest.mark.parametrize("alert", sorted(SCENES))
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    at, bad, labels, good = SCENES[alert]
    fires(FOLDER / "prometheus-rules.yaml", tmp_path, alert, at, bad, labels)
    fires(FOLDER / "prometheus-rules.yaml", tmp_path, alert, at, good, None)
