from __future__ import annotations

import threading
from pathlib import Path

import pytest

from modelyard.tracking import SpoolRun, Tracker, read_events, replay


def test_a_spool_run_records_events_in_order(tmp_path: Path) -> None:
    run = SpoolRun(tmp_path / "run", name="base")
    run.log_params({"lr": 3e-4, "api_key": "abc"})
    run.log_metrics({"loss": 4.0}, step=1)
    run.set_tags({"who": "me"})
    run.end("FINISHED")
    events = read_events(tmp_path / "run")
    assert [e["event"] for e in events] == ["start", "params", "metrics", "tags", "end"]
    assert events[1]["values"] == {"lr": "0.0003", "api_key": "[redacted]"}
    assert run.id is None


def test_an_unknown_status_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="FINISHED"):
        SpoolRun(tmp_path / "run").end("DONE")


def test_threads_do_not_tear_lines(tmp_path: Path) -> None:
    run = SpoolRun(tmp_path / "run")

    def work(thread: int) -> None:
        for step in range(25):
            run.log_metrics({f"loss_{thread}": 1.0}, step=step)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(read_events(tmp_path / "run")) == 101


def test_a_line_torn_by_a_kill_is_skipped_and_the_next_one_survives(tmp_path: Path) -> None:
    run = SpoolRun(tmp_path / "run")
    with (tmp_path / "run" / "events.jsonl").open("a") as handle:
        handle.write('{"event": "metr')
    run.log_metrics({"loss": 1.0}, step=3)
    assert [e["event"] for e in read_events(tmp_path / "run")] == ["start", "metrics"]


def test_files_are_copied_because_the_original_may_go(tmp_path: Path) -> None:
    source = tmp_path / "loss.csv"
    source.write_text("step,loss\n")
    run = SpoolRun(tmp_path / "run")
    run.log_file(source, "plots/loss.csv")
    source.unlink()
    kept = Path(read_events(tmp_path / "run")[-1]["path"])
    assert kept.read_text() == "step,loss\n"


def test_replay_is_exact_even_when_it_is_cut_short_and_repeated(tmp_path: Path, root: Path) -> None:
    run = SpoolRun(tmp_path / "run", name="base", experiment="demo")
    run.log_params({"lr": 1e-3})
    for step in range(5):
        run.log_metrics({"loss": 5.0 - step}, step=step)
    run.log_text("note.txt", "hello")
    run.end("FAILED")
    with Tracker(str(root), "demo") as tracker:
        first = tracker.apply(None, read_events(tmp_path / "run")[:4])  # a replay that died on its way
        assert replay(tmp_path / "run", tracker) == first
        assert replay(tmp_path / "run", tracker) is None
        assert not (tmp_path / "run").exists()
        from modelyard.tracking.store import connect

        client = connect(tracker.store)
        found = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
        assert [r.info.run_id for r in found] == [first]
        assert found[0].info.status == "FAILED"
        assert found[0].data.params == {"lr": "0.001"}
        assert [m.step for m in client.get_metric_history(first, "loss")] == [0, 1, 2, 3, 4]
        assert [f.path for f in client.list_artifacts(first)] == ["note.txt"]
