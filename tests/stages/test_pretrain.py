"""Stage `pretrain` on Ray Train: the losses of the bare loop, whatever is killed on the way; bad input before work."""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from training_stage import artifact, plan, run_stage

from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.models import load_model
from modelyard.stages.base import StageResult
from modelyard.stages.pretrain import PretrainOptions, PretrainStage
from modelyard.stages.tokenize import TokenizeOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from training_parts import TINY, pretraining, wait_until, write_tokens

STEPS = 120


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="module")
def expected(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of the same job in one process, without Ray."""
    from modelyard.train.programs import pretrain
    from modelyard.train.world import World

    job = pretraining(tokens, tmp_path_factory.mktemp("bare"), steps=STEPS, checkpoint_every=STEPS)
    outcome = pretrain(job, World(0, 1, torch.device("cpu")))
    return [row["loss"] for row in outcome.history]


def options(**changes: Any) -> PretrainOptions:
    values = {
        "kind": "pretrain",
        "model": TINY.model_dump(),
        "steps": STEPS,
        "global_batch": 8,
        "micro_batch": 4,
        "learning_rate": 1e-2,
        "checkpoint_every": 10,
        "evaluate_every": 60,
        "resources": {"workers": 2},
        **changes,
    }
    return PretrainOptions.model_validate(values)


def losses(folder: Path) -> list[float]:
    with (folder / "out" / "loss.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows] == list(range(1, STEPS + 1)), "every step once"
    return [float(row["loss"]) for row in rows]


def has_checkpoint(folder: Path, step: int) -> bool:
    return any(
        int(p.parent.name.split("-")[1]) >= step for p in (folder / "work" / "checkpoints").glob("step-*/complete.json")
    )


def kill_a_driver(tokens: Path, folder: Path, step: int) -> None:
    """Runs the stage as a program with a Ray of its own and kills both after the checkpoint of `step`."""
    script = Path(__file__).with_name("training_stage.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    driver = subprocess.Popen(
        [sys.executable, str(script), str(folder), str(tokens), options().model_dump_json()], env=environment
    )
    wait_until(lambda: has_checkpoint(folder, step) or driver.poll() is not None, 600)
    started = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    for process in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def kill_a_worker(folder: Path, step: int, killed: list[int]) -> None:
    """Kills a worker of this process's Ray after the checkpoint of `step`."""
    wait_until(lambda: has_checkpoint(folder, step), 600)
    workers = [p for p in psutil.Process().children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    os.kill(workers[-1].pid, signal.SIGKILL)
    killed.append(workers[-1].pid)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_killed_driver_and_a_killed_worker_change_no_loss(
    tokens: Path, tmp_path: Path, expected: list[float]
) -> None:
    """One run for both: what costs here is Ray Train's start, which imports torch in every process."""
    import threading

    kill_a_driver(tokens, tmp_path, 10)
    assert not (tmp_path / "out" / "report.html").exists(), "killed before the end"
    assert not has_checkpoint(tmp_path, 60)
    killed: list[int] = []
    thread = threading.Thread(target=kill_a_worker, args=(tmp_path, 60, killed))
    thread.start()
    result = run_stage(options(samples={"every": 60, "tokens": 4}), {"tokens": artifact(tokens, "tokenize")}, tmp_path)
    thread.join()
    assert killed
    assert losses(tmp_path) == pytest.approx(expected, abs=1e-5)
    screen = (tmp_path / "screen.txt").read_text()
    by_driver, by_worker = (int(step) for step in re.findall(r"resumed from step-(\d+)", screen))
    assert 10 <= by_driver < 60 <= by_worker < STEPS
    assert "starting again" in screen
    check_results(result, tmp_path)
    events = [json.loads(line) for p in (tmp_path / "spool").rglob("*.jsonl") for line in p.read_text().splitlines()]
    logged = {e["step"] for e in events if e["event"] == "metrics" and "loss" in e["values"]}
    assert logged >= set(range(by_driver + 1, STEPS + 1))


def check_results(result: StageResult, folder: Path) -> None:
    """What the stage leaves: figures, a model that loads, a report with all its parts."""
    assert result.metrics["heldout_loss"] < result.metrics["unigram_entropy"] == 5.6
    assert result.counts["steps"] == STEPS
    assert load_model(folder / "out" / "model").num_parameters() == result.counts["parameters"]
    assert (folder / "out" / "model" / "tokenizer_config.json").exists()
    report = (folder / "out" / "report.html").read_text()
    assert "held-out loss" in report
    assert report.count("<svg") == 4
    markdown = (folder / "out" / "report.md").read_text()
    for title in ("Predicted against measured", "Where the time of a step goes", "What the model writes"):
        assert f"## {title}" in markdown
    assert "| communication |" in markdown, "timed apart from forward and backward"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_stream_goes_on_where_a_run_without_it_stopped(tokens: Path, tmp_path: Path) -> None:
    """Half a run in one process without Ray, the other half on two workers that Ray Data feeds."""
    from modelyard.train.programs import pretrain
    from modelyard.train.world import World

    job = pretraining(tokens, tmp_path / "work", steps=12, checkpoint_every=6, global_batch=5)
    whole = pretrain(job, World(0, 1, torch.device("cpu"))).history
    shutil.rmtree(tmp_path / "work" / "checkpoints" / "step-00000012")
    half = options(steps=12, global_batch=5, checkpoint_every=6, evaluate_every=0, stream=True)
    run_stage(half, {"tokens": artifact(tokens, "tokenize")}, tmp_path)
    assert "resumed from step-00000006" in (tmp_path / "screen.txt").read_text()
    with (tmp_path / "out" / "loss.csv").open() as handle:
        found = [float(row["loss"]) for row in csv.DictReader(handle)]
    assert found == pytest.approx([row["loss"] for row in whole], abs=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_an_error_of_the_data_reaches_the_person(tmp_path: Path) -> None:
    folder = write_tokens(tmp_path / "tokens", 20, 5)
    shard = next((folder / "train").glob("*.bin"))
    shard.write_bytes(shard.read_bytes()[:-7])
    once = options(restarts=0, resources={"workers": 1})
    with pytest.raises(DataError, match="token shard has"):
        run_stage(once, {"tokens": artifact(folder, "tokenize")}, tmp_path)


@pytest.mark.usefixtures("ray_session")
def test_more_workers_than_cpus_is_refused(tokens: Path, tmp_path: Path) -> None:
    many = options(resources={"workers": 2, "cpus_per_worker": 500})
    with pytest.raises(ResourceError, match="2 workers need 1000 CPU"):
        run_stage(many, {"tokens": artifact(tokens, "tokenize")}, tmp_path)
    fewest = options(resources={"workers": [3, 8], "cpus_per_worker": 500})
    with pytest.raises(ResourceError, match="at least 3 workers need 1500 CPU") as caught:
        run_stage(fewest, {"tokens": artifact(tokens, "tokenize")}, tmp_path)
    assert "workers: [1, 8]" in caught.value.mend


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"parallel": {"data": 3}}, ResourceError, "there are 2 workers"),
        ({"parallel": {"shard": 4}}, ResourceError, "there are 2 workers"),
        (
            {"parallel": {"shard": 2}, "resources": {"workers": [1, 2]}},
            ResourceError,
            "an elastic number of workers leaves the degrees of the mesh open",
        ),
        ({"global_batch": 1}, ResourceError, "cannot feed 2 workers"),
        ({"attention": "flex"}, ResourceError, "flex attention trains on CUDA only"),
        ({"model": {"preset": "llama-8m", "max_position_embeddings": 16}}, RecipeError, "longer than the model's 16"),
        ({"model": {"preset": "llama-8m", "vocab_size": 299}}, DataError, "vocabulary of 300"),
        ({"model": {"preset": "llama-8m", "hidden_size": 250}}, RecipeError, "do not divide hidden_size 250"),
        ({"model": {"preset": "llama-8m", "num_key_value_heads": 3}}, RecipeError, "key-value heads"),
        ({"model": {"preset": "llama-8m", "hidden_size": 252}}, RecipeError, "heads of 63 channels cannot be rotated"),
        ({"model": {"config": {"model_type": "gpt2", "n_positions": 16}}}, RecipeError, "longer than the model's 16"),
        ({"model": None}, RecipeError, "no model is given"),
        ({"stream": True, "mixture": {"weights": {"corpus": 1.0}}}, RecipeError, "a stream reads one token artifact"),
    ],
)
def test_mistakes_are_seen_before_work(tokens: Path, changes: dict[str, Any], kind: type, complaint: str) -> None:
    ctx = plan(options(**changes), {"tokens": artifact(tokens, "tokenize")})
    with pytest.raises(kind, match=complaint):
        PretrainStage().check(ctx)


def test_tokens_that_do_not_go_together_are_seen_before_work(tokens: Path, tmp_path: Path) -> None:
    facts = json.loads((tokens / "tokens.json").read_text())
    (tmp_path / "tokens.json").write_text(json.dumps(facts | {"vocab_size": 299}))
    inputs = {"tokens": artifact(tokens, "tokenize"), "code": artifact(tmp_path, "tokenize")}
    with pytest.raises(DataError, match="code has a vocab_size of 299, tokens of 300"):
        PretrainStage().check(plan(options(), inputs))
    (tmp_path / "tokens.json").write_text(json.dumps(facts))
    PretrainStage().check(plan(options(), inputs))


def test_mistakes_are_seen_even_before_the_tokens_exist() -> None:
    upstream = {"tokens": TokenizeOptions(kind="tokenize", sequence_length=4096)}
    with pytest.raises(RecipeError, match="4,096 tokens are longer than the model's 2,048"):
        PretrainStage().check(plan(options(model={"preset": "llama-8m"}), {}, upstream))
    PretrainStage().check(plan(options(model={"preset": "llama-8b"}), {}, upstream))


def test_a_model_too_large_for_the_worker_names_the_knob(tokens: Path) -> None:
    ctx = plan(
        options(model={"preset": "llama-8b"}, resources={"workers": 2, "memory_per_worker": "4GiB"}),
        {"tokens": artifact(tokens, "tokenize")},
    )
    with pytest.raises(ResourceError, match="a worker would need") as caught:
        PretrainStage().estimate(ctx)
    assert "workers" in caught.value.mend


def test_the_estimate_counts_parameters_tokens_and_warns(tokens: Path) -> None:
    estimate = PretrainStage().estimate(plan(options(learning_rate=0.5), {"tokens": artifact(tokens, "tokenize")}))
    assert estimate.parameters == 28_192
    assert estimate.tokens == STEPS * 8 * 32
    assert estimate.memory_bytes is not None
    assert estimate.seconds is not None
    assert math.isfinite(estimate.seconds)
    assert any("learning_rate 0.5" in note for note in estimate.notes)
    unknown = PretrainStage().estimate(plan(options(), {}, {"tokens": TokenizeOptions(kind="tokenize")}))
    assert unknown.tokens == STEPS * 8 * 1024


def test_a_larger_vocabulary_needs_an_extended_tokenizer(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    config = {
        "model_type": "llama", "vocab_size": 290, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1,
        "intermediate_size": 64,
    }  # fmt: skip
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    inputs = {"tokens": artifact(tokens, "tokenize"), "model": artifact(tmp_path, "pretrain")}
    with pytest.raises(DataError, match="vocabulary of 300"):
        PretrainStage().check(plan(options(model=None), inputs))
    words = (tokens / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "model" / "tokenizer.json").write_text(words)
    PretrainStage().check(plan(options(model=None), inputs))
    PretrainStage().check(plan(options(), inputs))
