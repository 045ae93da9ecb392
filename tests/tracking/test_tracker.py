from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.storage import InputEntry
from modelyard.tracking import Tracker, read_events, status
from modelyard.tracking.store import connect, find_store

RECIPE, STAGE = "a" * 64, "b" * 64
INPUTS = {"tokens": InputEntry(fingerprint="c" * 64, stage="tokens", uri="/data/tokens", files=3, bytes=99)}
NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


def client_of(root: Path) -> Any:
    return connect(find_store(str(root)))


def test_a_recipe_and_its_stage_are_nested_runs_with_lineage(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with Tracker(str(root), "demo") as tracker:
        parent = tracker.start_recipe({"seed": 7}, {"who": "me"}, RECIPE)
        run = tracker.start_stage(parent, "base", "pretrain", {"model": {"preset": "tiny"}}, INPUTS, STAGE)
        for step in range(100):
            run.log_metrics({"loss": 5 - step / 100}, step=step)
        run.log_text("report/loss.csv", "step,loss\n")
        run.end()
        parent.end()
    client = client_of(root)
    found = client.get_run(run.id)
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.parentRunId"] == parent.id
    assert found.data.tags["modelyard.input.tokens"] == f"tokens@{'c' * 12}"
    assert found.data.params == {"model.preset": "tiny"}
    assert [m.step for m in client.get_metric_history(run.id, "loss")] == list(range(100))
    dataset = found.inputs.dataset_inputs[0].dataset
    assert (dataset.name, dataset.digest) == ("tokens", "c" * 36)
    assert [f.path for f in client.list_artifacts(run.id, "report")] == ["report/loss.csv"]
    assert [p.name for p in tmp_path.iterdir()] == ["root"], "MLflow wrote into the working directory"

    (execution,) = status(str(root), "demo")
    assert (execution.id, execution.status, execution.fingerprint) == (parent.id, "FINISHED", RECIPE)
    (stage,) = execution.stages
    assert (stage.name, stage.kind, stage.status) == ("base", "pretrain", "FINISHED")
    assert stage.metrics["loss"] == pytest.approx(4.01)


def test_status_of_a_root_without_runs_is_empty_and_makes_nothing(tmp_path: Path) -> None:
    assert status(str(tmp_path / "root"), "demo") == []
    assert not (tmp_path / "root").exists()


def test_metrics_arrive_while_the_run_is_open(root: Path) -> None:
    with Tracker(str(root), "demo") as tracker:
        run = tracker.start_recipe({}, {}, RECIPE)
        run.log_metrics({"loss": 1.0}, step=1)
        deadline = time.monotonic() + 15
        client = client_of(root)
        while "loss" not in client.get_run(run.id).data.metrics:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert client.get_run(run.id).info.status == "RUNNING"


def test_many_threads_may_log_to_one_run(root: Path) -> None:
    with Tracker(str(root), "demo") as tracker:
        run = tracker.start_recipe({}, {}, RECIPE)

        def work(number: int) -> None:
            for step in range(50):
                run.log_metrics({f"m{number}": float(step)}, step=step)
                run.set_tags({f"t{number}": step})

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        run.end()
    client = client_of(root)
    assert all(len(client.get_metric_history(run.id, f"m{n}")) == 50 for n in range(4))
    assert client.get_run(run.id).data.tags["t3"] == "49"


def test_a_restarted_stage_continues_its_run_and_a_changed_parameter_becomes_a_tag(root: Path) -> None:
    with Tracker(str(root), "demo") as tracker:
        parent = tracker.start_recipe({}, {}, RECIPE)
        first = tracker.start_stage(parent, "base", "pretrain", {"workers": 2}, {}, STAGE)
        first.end("FAILED")
        again = tracker.start_stage(parent, "base", "pretrain", {"workers": 1}, {}, STAGE, existing_run_id=first.id)
        assert again.id == first.id
        again.end()
    found = client_of(root).get_run(first.id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {"workers": "2"}
    assert found.data.tags["modelyard.changed.workers"] == "1"


def test_an_unknown_run_id_starts_a_new_run(root: Path) -> None:
    with Tracker(str(root), "demo") as tracker:
        parent = tracker.start_recipe({}, {}, RECIPE)
        run = tracker.start_stage(parent, "base", "pretrain", {}, {}, STAGE, existing_run_id="0" * 32)
        assert run.id not in (None, "0" * 32)


def test_closing_marks_open_runs_killed(root: Path) -> None:
    with Tracker(str(root), "demo") as tracker:
        run = tracker.start_recipe({}, {}, RECIPE)
    assert client_of(root).get_run(run.id).info.status == "KILLED"


def test_secrets_reach_neither_the_store_nor_the_spool(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HUB_TOKEN", "hf_verysecretvalue")
    for place, uri in ((root, None), (tmp_path / "spooled", NOWHERE)):
        with Tracker(str(place), "demo", uri) as tracker:
            run = tracker.start_recipe({"api_key": "hf_verysecretvalue"}, {"note": "uses hf_verysecretvalue"}, RECIPE)
            run.log_text("log.txt", "Authorization: hf_verysecretvalue")
            run.end()
        assert not any(b"verysecret" in f.read_bytes() for f in place.rglob("*") if f.is_file())


def test_without_mlflow_work_goes_on_with_one_warning_and_everything_is_replayed(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    started = time.monotonic()
    with Tracker(str(root), "demo", NOWHERE, say=said.append) as tracker:
        parent = tracker.start_recipe({"seed": 7}, {}, RECIPE)
        run = tracker.start_stage(parent, "base", "pretrain", {"lr": 1e-3}, INPUTS, STAGE)
        run.log_metrics({"loss": 2.5}, step=3)
        (tmp_path / "big.bin").write_bytes(b"x" * 10)
        run.log_file(tmp_path / "big.bin", "files/big.bin")
        (tmp_path / "big.bin").unlink()
        run.end()
        parent.end()
        assert (parent.id, run.id) == (None, None)
    assert time.monotonic() - started < 10
    assert len(said) == 1
    assert NOWHERE in said[0]
    spools = sorted((root / "mlflow" / "spool").iterdir())
    assert [read_events(s)[-1]["event"] for s in spools] == ["end", "end"]

    for _ in range(2):  # the second start finds nothing left to replay
        with Tracker(str(root), "demo"):
            assert list((root / "mlflow" / "spool").iterdir()) == []
    (execution,) = status(str(root), "demo")
    (stage,) = execution.stages
    assert (execution.status, stage.status, stage.metrics) == ("FINISHED", "FINISHED", {"loss": 2.5})
    client = client_of(root)
    assert len(client.get_metric_history(stage.id, "loss")) == 1
    assert [f.path for f in client.list_artifacts(stage.id, "files")] == ["files/big.bin"]


def test_a_remote_root_keeps_its_store_at_home_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = find_store("s3://bucket/prefix")
    assert store.folder.is_relative_to(tmp_path / ".modelyard")
    assert store.note
    assert find_store("s3://bucket/other").folder != store.folder


def test_the_environment_names_the_store_and_an_argument_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://one:5000")
    assert find_store("/data").uri == "http://one:5000"
    assert find_store("/data", "http://two:5000").uri == "http://two:5000"


_VICTIM = """
import sys, time
from modelyard.tracking import Tracker
tracker = Tracker(sys.argv[1], "demo")
parent = tracker.start_recipe({}, {}, sys.argv[2])
run = tracker.start_stage(parent, "base", "pretrain", {}, {}, "b" * 64)
run.log_metrics({"loss": 3.0}, step=1)
tracker.flush()
print(parent.id, run.id, flush=True)
time.sleep(600)
"""


def killed_run(root: Path, fingerprint: str) -> list[str]:
    """Ids of a recipe run and a stage run whose process was killed with SIGKILL."""
    path = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    command = [sys.executable, "-c", _VICTIM, str(root), fingerprint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=path) as victim:
        assert victim.stdout is not None
        ids = victim.stdout.readline().split()
        victim.send_signal(signal.SIGKILL)
    assert len(ids) == 2
    return ids


def test_runs_of_a_killed_process_are_resumed_or_closed(root: Path) -> None:
    parent_id, run_id = killed_run(root, RECIPE)
    with Tracker(str(root), "demo") as tracker:
        parent = tracker.start_recipe({}, {}, RECIPE)
        run = tracker.start_stage(parent, "base", "pretrain", {}, {}, STAGE)
        assert (parent.id, run.id) == (parent_id, run_id)
        run.log_metrics({"loss": 2.0}, step=2)
        run.end()
        parent.end()
    client = client_of(root)
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]

    other_id, other_stage = killed_run(root, "d" * 64)
    with Tracker(str(root), "demo") as tracker:
        assert tracker.start_recipe({}, {}, RECIPE).id not in (parent_id, other_id)
    assert {client.get_run(i).info.status for i in (other_id, other_stage)} == {"KILLED"}
    assert client.get_run(run_id).info.status == "FINISHED"
