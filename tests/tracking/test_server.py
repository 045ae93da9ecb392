"""A real `mlflow server`: runs, registry, and its death in the middle of the work."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.storage import InputEntry
from modelyard.tracking import Registry, Tracker, resolve, status
from modelyard.tracking import tracker as tracker_module
from modelyard.tracking.store import connect

RECIPE, STAGE = "a" * 64, "b" * 64


def steps(client: Any, run_id: str) -> list[int]:
    return [m.step for m in client.get_metric_history(run_id, "loss")]


def test_runs_files_and_models_reach_a_server(mlflow_server: Any, tmp_path: Path) -> None:
    uri = mlflow_server.uri
    inputs = {"tokens": InputEntry(fingerprint="c" * 64, stage="tokens", uri="/data/tokens")}
    with Tracker(str(tmp_path), "served", uri) as tracker:
        parent = tracker.start_recipe({"seed": 1}, {}, RECIPE)
        run = tracker.start_stage(parent, "base", "pretrain", {"lr": 1e-3}, inputs, STAGE)
        run.log_metrics({"loss": 3.0}, step=1)
        run.log_text("report.html", "<p>done</p>")
        run.end()
        parent.end()
    (execution,) = status(str(tmp_path), "served", uri)
    (stage,) = execution.stages
    assert (execution.id, stage.id, stage.metrics) == (parent.id, run.id, {"loss": 3.0})
    assert [f.path for f in connect(tracker.store).list_artifacts(run.id)] == ["report.html"]

    registry = Registry(str(tmp_path), uri)
    for expected in (1, 1):
        made = registry.register("served", str(tmp_path / "model"), fingerprint=STAGE, run_id=run.id)
        assert made.version == expected
    assert resolve("models:/served@champion", root=str(tmp_path), uri=uri) == (str(tmp_path / "model"), 1)


def test_a_server_killed_midway_loses_and_doubles_nothing(
    mlflow_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "RETRY_S", 0.5)
    said: list[str] = []
    with Tracker(str(tmp_path), "interrupted", mlflow_server.uri, say=said.append) as tracker:
        parent = tracker.start_recipe({}, {}, RECIPE)
        early = tracker.start_stage(parent, "corpus", "curate", {}, {}, STAGE)
        for step in range(10):
            early.log_metrics({"loss": 9.0 - step}, step=step)
        tracker.flush()

        mlflow_server.kill()
        for step in range(10, 20):
            early.log_metrics({"loss": 9.0 - step}, step=step)
        early.log_text("after.txt", "written while the server was dead")
        early.end()
        late = tracker.start_stage(parent, "base", "pretrain", {"lr": 1e-3}, {}, STAGE)
        late.log_metrics({"loss": 5.0}, step=0)
        tracker.flush()
        assert not tracker.online
        assert late.id is None
        assert len([s for s in said if "away" in s]) == 1

        mlflow_server.start()
        deadline = time.monotonic() + 60
        while late.id is None:
            assert time.monotonic() < deadline, "the tracker did not come back"
            time.sleep(0.1)
        late.log_metrics({"loss": 4.0}, step=1)
        late.end()
        parent.end()
    assert list(tracker.spool.iterdir()) == []

    with Tracker(str(tmp_path), "interrupted", mlflow_server.uri):  # a later start finds nothing to replay
        pass
    (execution,) = status(str(tmp_path), "interrupted", mlflow_server.uri)
    assert [(s.name, s.status) for s in execution.stages] == [("corpus", "FINISHED"), ("base", "FINISHED")]
    client = connect(tracker.store)
    assert steps(client, execution.stages[0].id) == list(range(20))
    assert steps(client, execution.stages[1].id) == [0, 1]
    assert [f.path for f in client.list_artifacts(execution.stages[0].id)] == ["after.txt"]
