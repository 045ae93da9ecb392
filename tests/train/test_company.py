"""What accompanies a run: rewinds, early stopping, samples, profiles, the watch over steps, and memory errors."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_parts import launch, pretraining

from modelyard.errors import ResourceError
from modelyard.planner.fitting import advise
from modelyard.train.clock import PHASES, Clock
from modelyard.train.guard import DivergedError
from modelyard.train.hooks import Chain, Hooks
from modelyard.train.loop import Outcome
from modelyard.train.memory import OutOfMemoryError, memory_named, out_of_memory
from modelyard.train.metrics import StepMetrics
from modelyard.train.objective import causal_lm
from modelyard.train.programs import PretrainJob, pretrain
from modelyard.train.watchdog import HUNG, Watchdog, stacks
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


def job(tokens: Path, folder: Path, **train: Any) -> PretrainJob:
    return pretraining(tokens, folder, **train).model_copy(update={"reports": str(folder / "reports")})


def losses(outcome: Outcome) -> list[float]:
    return [row["loss"] for row in outcome.history]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Makes `left` losses not a number from the `at`-th forward pass on, as a hardware fault would."""
    state = {"calls": 0, "at": 1 << 30, "left": 0}

    def objective(model: Any, batch: Any) -> Any:
        loss, metrics = causal_lm(model, batch)
        if not model.training:
            return loss, metrics
        state["calls"] += 1
        if state["calls"] >= state["at"] and state["left"]:
            state["left"] -= 1
            loss = loss * math.nan
        return loss, metrics

    monkeypatch.setattr("modelyard.train.choose_objective.causal_lm", objective)
    return state


def test_a_rewind_goes_back_to_the_last_checkpoint_at_a_lower_rate(
    tokens: Path, tmp_path: Path, poison: dict[str, int]
) -> None:
    spikes = {"rewinds": 1, "rate": 0.5}
    options = {"micro_batch": 8, "bad_steps": 1, "warmup": 0, "schedule": "constant", "spikes": spikes}
    poison.update(at=7, left=2)
    said: list[str] = []
    outcome = pretrain(job(tokens, tmp_path, **options), ALONE, say=said.append)
    assert [row["step"] for row in outcome.history] == list(range(1, 13)), "every step once"
    rates = [row["learning_rate"] for row in outcome.history]
    assert rates == [1e-2] * 4 + [0.5e-2] * 8
    assert [row.get("rewinds", 0) for row in outcome.history] == [0] * 4 + [1] * 8
    assert said[0] == "step 7: update left out, loss nan, gradient norm nan"
    assert "resumed from step-00000004" in said[1]
    assert "back to step 4, rate x 0.5" in said[2]
    assert outcome.skipped == 0
    poison.update(calls=0, at=10, left=3)
    with pytest.raises(DivergedError, match="no checkpoint to go back to"):
        pretrain(job(tokens, tmp_path / "none", **options, checkpoint_every=100), ALONE)


def test_a_run_ends_when_the_heldout_loss_stands_still(tokens: Path, tmp_path: Path) -> None:
    stop = {"every": 2, "patience": 2, "min_delta": 5.0, "sequences": 8}
    outcome = pretrain(job(tokens, tmp_path, steps=40, stop=stop), ALONE)
    assert outcome.steps == 6, "the first evaluation counts as progress, two more do not"
    assert "has not fallen by 5" in outcome.stopped
    assert outcome.tokens == 6 * 8 * 32
    assert (tmp_path / "model" / "config.json").exists()
    again = pretrain(job(tokens, tmp_path, steps=40, stop=stop), ALONE)
    assert losses(again) == losses(outcome), "a rerun knows that it had ended"
    gain = {"every": 2, "patience": 100, "gain": 50.0, "sequences": 8}
    early = pretrain(job(tokens, tmp_path / "gain", steps=40, stop=gain), ALONE)
    assert early.steps == 12
    assert "the next doubling buys" in early.stopped
    points = [(row["tokens"], row["heldout_loss"]) for row in early.history if "heldout_loss" in row]
    assert advise(points, worth=50.0).text == early.stopped


def test_samples_profile_and_timings_leave_the_losses_alone(tokens: Path, tmp_path: Path) -> None:
    missed: list[str] = []
    plain = pretrain(job(tokens, tmp_path / "plain", profile="steps=50..51"), ALONE, say=missed.append)
    assert missed[-1] == "no profile: steps 50 to 51 are not among those trained here, 1 to 12"
    seen: list[StepMetrics] = []
    samples = {"every": 5, "prompts": ["abc", "x", ""], "tokens": 6}
    extra = {"samples": samples, "profile": "steps=6..7"}
    said: list[str] = []
    outcome = pretrain(job(tokens, tmp_path, **extra), ALONE, seen.append, said.append)
    assert losses(outcome) == losses(plain), "bit-identical"
    folder = tmp_path / "reports"
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [f"step-{n:08d}.json" for n in (5, 10, 12)]
    rows = json.loads((folder / "samples" / "step-00000012.json").read_text())
    assert [row["prompt"] for row in rows] == samples["prompts"]
    trace = json.loads(gzip.decompress((folder / "profile" / "trace-rank-0.json.gz").read_bytes()))
    assert sum(e.get("name") == "Optimizer.step#AdamW.step" for e in trace["traceEvents"]) == 2
    assert "aten::mm" in (folder / "profile" / "operators-rank-0.txt").read_text()
    with (folder / "profile" / "memory-rank-0.csv").open() as handle:
        sizes = [int(row["bytes"]) for row in csv.DictReader(handle)]
    assert max(sizes) > min(sizes)
    assert "profiled 2 steps" in said[0]
    assert outcome.peak_bytes > 50 * 2**20
    assert set(outcome.phases) <= {f"{phase}_seconds" for phase in PHASES}
    assert outcome.phases["backward_seconds"] > 0
    assert [m.step for m in seen if m.timings] == [10], "now and then"


def test_a_greedy_sample_is_what_the_model_prefers(tokens: Path, tmp_path: Path) -> None:
    from modelyard.models import load_model
    from modelyard.train.samples import continue_prompts

    pretrain(job(tokens, tmp_path), ALONE)
    model = load_model(tmp_path / "model")
    prompts = [[5, 6, 7], [9]]
    written = continue_prompts(model, prompts, 4, 0.0, 0, ALONE.device)
    for prompt, ids in zip(prompts, written, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert ids == alone[0, len(prompt) :].tolist()


def test_a_phase_inside_another_counts_once() -> None:
    clock = Clock(torch.device("cpu"))
    with clock("forward"):
        for _ in range(3):
            with clock("communication"):
                threading.Event().wait(0.01)
    found = clock.finish()
    assert found["communication_seconds"] >= 0.03
    assert found["forward_seconds"] < found["communication_seconds"]
    assert clock.finish() == {}


def test_hooks_are_closed_after_an_error_and_all_of_them_answer(tokens: Path, tmp_path: Path) -> None:
    class Asking(Hooks):
        closed = answers = 0

        def asks(self) -> bool:
            return True

        def answer(self) -> bool:
            self.answers += 1
            return self.answers == 2

        def close(self) -> None:
            self.closed += 1

    def broken(metrics: StepMetrics) -> None:
        if metrics.step == 3:
            raise KeyError

    one, two = Asking(), Asking()
    with pytest.raises(KeyError):
        pretrain(job(tokens, tmp_path), ALONE, sink=broken, hooks=Chain([one, two]))
    assert one.answers == two.answers == 2
    assert one.closed == two.closed == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"], "asked for"


def test_the_watch_dumps_stacks_once_a_step_takes_too_long(tmp_path: Path) -> None:
    ended = threading.Event()
    said: list[str] = []
    watch = Watchdog(0.2, 3, str(tmp_path), said.append, ended.set)
    watch.begin(4, 10)
    assert ended.wait(60)
    watch.close()
    assert "step 5 took longer than 0.2 s on worker 3" in said[0]
    assert "test_the_watch_dumps" in (tmp_path / "hangs" / "step-5-rank-3.txt").read_text()
    assert stacks().startswith("MainThread")


def test_a_hang_ends_all_workers_and_leaves_the_stacks_of_each(tokens: Path, tmp_path: Path) -> None:
    processes = launch(job(tokens, tmp_path, step_timeout=1.5), 2, tmp_path / "out.json", pause=1000)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [HUNG] * 2
    dumps = {p.name: p.read_text() for p in (tmp_path / "reports" / "hangs").iterdir()}
    assert sorted(dumps) == ["step-1-rank-0.txt", "step-2-rank-1.txt"], "rank 0 sleeps, rank 1 waits for it"
    assert "in sink" in dumps["step-1-rank-0.txt"]
    assert "forward_backward" in dumps["step-2-rank-1.txt"]


def test_the_heldout_loss_is_told_by_source(tokens: Path, tmp_path: Path) -> None:
    from modelyard.tokens import Sequences, TokenDataset, TokenWriter

    folder = tmp_path / "tokens"
    shutil.copytree(tokens, folder)
    held = TokenDataset.open(tokens / "heldout").batch(range(40))
    shutil.rmtree(folder / "heldout")
    writer = TokenWriter(folder / "heldout", 32, 300)
    noise = np.random.default_rng(0).integers(8, 300, (10, 32))
    for name, rows in (("books", held["input_ids"]), ("noise", noise)):
        n = len(rows)
        writer.add(Sequences(rows, np.zeros((n, 32), dtype=bool), np.full(n, 32)), source=name, documents=n)
    writer.close()
    outcome = pretrain(job(folder, tmp_path, steps=30, evaluate_every=30, evaluate_sequences=10), ALONE)
    assert outcome.heldout_loss is not None
    assert list(outcome.by_source) == ["books", "noise"]
    assert outcome.by_source["noise"] > outcome.by_source["books"] + 0.3
    weighed = (40 * outcome.by_source["books"] + 10 * outcome.by_source["noise"]) / 50
    assert outcome.heldout_loss == pytest.approx(weighed, abs=1e-9)
    on_the_way = outcome.history[-1]["heldout_loss"]
    assert outcome.by_source["books"] < on_the_way < outcome.by_source["noise"], "ten sequences of both"


def test_running_out_of_memory_is_a_named_error() -> None:
    with pytest.raises(OutOfMemoryError, match=r"1 GiB were predicted, .* are available") as caught:  # noqa: SIM117
        with memory_named(ALONE.device, predicted=2**30):
            torch.empty(1 << 50)
    assert isinstance(caught.value, ResourceError)
    assert "micro_batch" in caught.value.mend
    assert "can't allocate memory" in caught.value.place
    with pytest.raises(RuntimeError, match="something else"), memory_named(ALONE.device):
        raise RuntimeError("something else")
    assert str(out_of_memory("cause", None, None)).startswith("a worker ran out of memory\n")
