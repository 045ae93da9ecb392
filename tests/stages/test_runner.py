"""The graph runner: skip, resume, reasons, side by side, failures, locks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from modelyard import load, plan, run
from modelyard.errors import DataError, RecipeError, ResourceError, StageError
from modelyard.stages import registry
from modelyard.stages.garbage import collect, delete
from modelyard.stages.graph import select
from modelyard.stages.report import write_report
from modelyard.storage import ArtifactStore, read_bytes

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    registry.add("count", "kinds:CountStage")
    registry.add("fragile", "kinds:FragileStage")


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello")
    (tmp_path / "in" / "b.txt").write_text("worlds")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        textwrap.dedent(f"""
        name: tiny
        root: {tmp_path}/root
        stages:
          both: {{kind: count, inputs: {{left: a, right: b}}}}
          a: {{kind: count, inputs: {{files: "{tmp_path}/in/a.txt"}}}}
          b: {{kind: count, inputs: {{files: "{tmp_path}/in/*"}}, scale: 2}}
        """)
    )
    return path


def test_runs_in_order_of_inputs_and_then_has_nothing_to_do(ray_session: None, recipe_file: Path) -> None:
    first = run(load(recipe_file))
    assert first.ran[-1] == "both"
    assert set(first.ran) == {"a", "b", "both"}
    assert read_bytes(first.artifacts["both"].join("count.txt")) == b"27"
    again = run(load(recipe_file))
    assert again.ran == []
    assert again.artifacts["both"].manifest.fingerprint == first.artifacts["both"].manifest.fingerprint
    first.artifacts["both"].verify()


def test_plan_names_what_changed_and_what_follows(ray_session: None, recipe_file: Path) -> None:
    run(load(recipe_file))
    steps = {p.name: p for p in plan(load(recipe_file, ["b.scale=3"]))}
    assert steps["a"].cached
    assert steps["b"].why == ("scale 2 -> 3",)
    assert steps["both"].why == ("input right changed (b)",)
    (recipe_file.parent / "in" / "a.txt").write_text("other")
    steps = {p.name: p for p in plan(load(recipe_file))}
    assert steps["a"].why == ("input files changed (files)",)
    assert not steps["b"].cached


def test_runtime_options_and_resources_do_not_rerun(ray_session: None, recipe_file: Path) -> None:
    run(load(recipe_file))
    changed = load(recipe_file, ["a.sleep=0.5", "a.resources.cpus_per_worker=0.5", "b.retries=3"])
    assert all(step.cached for step in plan(changed))


def test_ready_stages_run_side_by_side(ray_session: None, recipe_file: Path) -> None:
    outcome = run(load(recipe_file, ["a.sleep=2", "b.sleep=2"]))
    a, b = (outcome.artifacts[n].manifest for n in "ab")
    assert a.started < b.ended
    assert b.started < a.ended


def test_memory_that_ran_out_is_told_in_our_words(recipe_file: Path) -> None:
    from ray.exceptions import OutOfMemoryError

    from modelyard.stages.runner import _explained

    found = _explained("base", load(recipe_file), OutOfMemoryError("Refer to the documentation on how to address it"))
    assert isinstance(found, ResourceError)
    assert "ran out of memory" in found.what and found.place == "stage base"


def test_a_stage_that_raises_is_named_and_the_rest_is_kept(
    ray_session: None, recipe_file: Path, tmp_path: Path
) -> None:
    text = recipe_file.read_text() + "\n  bad: {kind: fragile, inputs: {before: a}}\n"
    recipe_file.write_text(text)
    with pytest.raises(StageError, match="ZeroDivisionError: unforeseen") as caught:
        run(load(recipe_file))
    assert caught.value.place == "stage bad"
    assert "error.txt" in caught.value.mend
    store = ArtifactStore(str(tmp_path / "root"))
    assert {a.stage for a in store.all()} >= {"a"}
    assert any("bad-" in uri for uri in store.unpublished())
    found = collect(str(tmp_path / "root"), keep=1)
    assert {item.reason for item in found} == {"not published (interrupted or running)"}
    delete(found)
    assert store.unpublished() == []


def test_retries_by_policy(ray_session: None, recipe_file: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    recipe_file.write_text(
        f"name: tiny\nroot: {tmp_path}/root\nstages:\n  x: {{kind: fragile, how: flaky, flag: {flag}, retries: 1}}\n"
    )
    assert run(load(recipe_file)).artifacts["x"].manifest.metrics["resumed"] == 1.0


def test_killed_driver_resumes_from_work(no_ray: None, recipe_file: Path, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    recipe_file.write_text(
        f"name: tiny\nroot: {tmp_path}/root\nstages:\n  x: {{kind: fragile, how: kill, flag: {flag}}}\n"
    )
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from modelyard.stages import registry;"
        "registry.add('fragile', 'kinds:FragileStage'); from modelyard.cli import main; import signal\n"
        "try: main(['run', sys.argv[2]])\n"
        "finally: print(signal.getsignal(signal.SIGTERM) is signal.default_int_handler)"  # Ray has one of its own
    )
    command = [sys.executable, "-c", script, str(HERE), str(recipe_file)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -9, killed.stderr
    assert list(ArtifactStore(str(tmp_path / "root")).all()) == []
    flag.touch()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("True\n"), "SIGTERM cleans up as Ctrl-C does"
    (artifact,) = ArtifactStore(str(tmp_path / "root")).all()
    assert artifact.manifest.metrics["resumed"] == 1.0
    assert read_bytes(artifact.join("part.txt")) == b"whole"
    assert not (tmp_path / "root" / "work").exists() or not list((tmp_path / "root" / "work").iterdir())


def test_check_refuses_before_anything_runs(recipe_file: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="13 is not a scale") as caught:
        run(load(recipe_file, ["both.scale=13"]))
    assert caught.value.place == "stages.both: scale"
    assert list(ArtifactStore(str(tmp_path / "root")).all()) == []


def test_two_runs_on_one_root_are_refused(recipe_file: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom modelyard.stages.runner import _locked\n"
            "with _locked(sys.argv[1]):\n    print('held', flush=True); time.sleep(60)",
            str(tmp_path / "root"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(ResourceError, match=f"process {holder.pid}"):
            run(load(recipe_file))
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["both.inputs.left=nowhere"], "neither a stage of this recipe nor an existing path"),
        (["a.inputs.left=both"], "cycle: "),
        (["a.inputs.middle=b"], "no input 'middle'"),
        (["both.inputs.left=bb"], "did you mean 'b'"),
    ],
)
def test_a_graph_that_cannot_be(recipe_file: Path, change: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        plan(load(recipe_file, change))
    assert message in str(caught.value)


def test_missing_files_are_named(recipe_file: Path) -> None:
    with pytest.raises(DataError, match="no file matches") as caught:
        plan(load(recipe_file, ["a.inputs.files=/nonexistent/*.txt"]))
    assert "stages.a.inputs.files: /nonexistent/*.txt" in caught.value.place


def test_select_keeps_what_a_target_needs(recipe_file: Path) -> None:
    recipe = load(recipe_file)
    assert list(select(recipe, ["a"]).stages) == ["a"]
    assert set(select(recipe, ["both"]).stages) == {"both", "a", "b"}
    assert set(select(recipe, kinds=["count"]).stages) == {"both", "a", "b"}
    with pytest.raises(RecipeError, match="no stage 'zz'"):
        select(recipe, ["zz"])


def test_report_lists_the_figures(ray_session: None, recipe_file: Path) -> None:
    with pytest.raises(DataError, match="nothing of this recipe is done"):
        write_report(load(recipe_file))
    run(load(recipe_file))
    text = Path(write_report(load(recipe_file))).read_text()
    assert "27 bytes" in text
    assert "3 of 3 stages done" in text


def test_unwritable_root_is_refused(recipe_file: Path, tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    from modelyard.errors import StorageError

    with pytest.raises(StorageError, match="root cannot be written"):
        run(load(recipe_file, [f"root={blocker}/below"]))


def test_stage_runs_are_nested_in_mlflow(ray_session: None, recipe_file: Path, tmp_path: Path) -> None:
    from modelyard.tracking import status

    started = time.time()
    outcome = run(load(recipe_file))
    (latest,) = status(str(tmp_path / "root"), "tiny")
    assert latest.status == "FINISHED"
    assert {s.name for s in latest.stages} == {"a", "b", "both"}
    assert {s.metrics["total"] for s in latest.stages} == {5.0, 22.0, 27.0}
    assert outcome.artifacts["both"].manifest.run_id in {s.id for s in latest.stages}
    assert time.time() - started < 300
    assert os.path.exists(tmp_path / "root" / "artifacts")
