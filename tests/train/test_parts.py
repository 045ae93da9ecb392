"""The loop's parts: budget, schedule, parameter groups, norms, guard, feed, meter, report."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn
from training_parts import TINY

from modelyard.errors import ResourceError
from modelyard.models import build_config, build_on_meta
from modelyard.train.data import Feed, make_order
from modelyard.train.guard import DivergedError, Guard, Verdict
from modelyard.train.metrics import Meter
from modelyard.train.optimizer import local_gradients, parameter_groups, squared_norm
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.parallel.layout import degrees
from modelyard.train.report import Line, Page, plot, thin
from modelyard.train.run_options import ProfileOptions, SpikeOptions, StopOptions
from modelyard.train.schedule import make_schedule
from modelyard.train.stopping import stop_reason


def test_budgets() -> None:
    assert TrainOptions().total_steps(320, 64) == 10
    assert TrainOptions(epochs=0.5, global_batch=10).total_steps(101, 64) == 6
    assert TrainOptions(tokens=64 * 32 * 7).total_steps(1, 64) == 7
    assert TrainOptions(steps=3).total_steps(1, 1) == 3
    with pytest.raises(ValidationError, match="one budget, not steps and tokens"):
        TrainOptions(steps=3, tokens=4)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_schedules_warm_up_and_come_down(name: str) -> None:
    options = TrainOptions(schedule=name, warmup=10, floor=0.1)
    factors = [make_schedule(options, 100)(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[0] > 0
    assert factors[10] == pytest.approx(1)
    assert factors[99] == pytest.approx(1.0 if name == "constant" else 0.1)
    assert factors[10:] == sorted(factors[10:], reverse=True)


@given(st.integers(1, 300), st.floats(0, 50), st.sampled_from(["cosine", "linear", "wsd", "constant"]))
def test_schedules_stay_within_bounds(steps: int, warmup: float, name: str) -> None:
    schedule = make_schedule(TrainOptions(schedule=name, warmup=warmup, floor=0.05), steps)
    assert all(0 < schedule(step) <= 1 for step in range(steps))


def test_norms_and_embeddings_do_not_decay() -> None:
    model = build_on_meta(build_config(TINY, 300))
    decayed, plain = parameter_groups(model, 0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all("proj" in names[id(p)] for p in decayed["params"])  # type: ignore[attr-defined]
    assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in plain["params"])  # type: ignore[attr-defined]
    assert len(decayed["params"]) + len(plain["params"]) == len(names)  # type: ignore[arg-type]


def test_squared_norm_is_torchs() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model(torch.randn(4, 5)).square().sum().backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert math.sqrt(squared_norm(local_gradients(model.parameters()))) == pytest.approx(float(expected), rel=1e-6)


def judged(guard: Guard, losses: list[float]) -> list[Verdict]:
    """Verdicts over a run whose losses these are; a rewind goes back to its beginning."""
    history: list[dict[str, float]] = []
    found = []
    for loss in losses:
        verdict = guard.judge(history, loss, 1.0)
        found.append(verdict)
        if verdict is Verdict.REWIND:
            guard.lower(history)
            history = history[:40]
            continue
        history.append({"step": len(history) + 1, "loss": loss, "skipped": int(verdict is Verdict.SKIP)})
    return found


def test_guard_skips_then_gives_up() -> None:
    yes, no = Verdict.ACCEPT, Verdict.SKIP
    assert judged(Guard(2), [1.0, math.nan, math.inf, 1.0, math.nan, math.nan]) == [yes, no, no, yes, no, no]
    with pytest.raises(DivergedError, match="step 4, 3 in a row"):
        judged(Guard(2), [1.0, math.nan, math.nan, math.nan])
    with pytest.raises(DivergedError, match="step 1"):
        judged(Guard(5), [math.nan])
    assert Guard(5).judge([{"step": 1, "loss": 1.0}], 1.0, math.inf) is no


def test_guard_skips_spikes_then_goes_back_at_a_lower_rate() -> None:
    calm = [3.0 + 0.01 * (i % 7) for i in range(64)]
    never, skip = SpikeOptions(skips=2), Verdict.SKIP
    assert judged(Guard(2, never), [*calm, 9.0, 3.0])[64:] == [skip, Verdict.ACCEPT]
    assert judged(Guard(2, never), [*calm, 9.0, 9.0, 9.0])[64:] == [skip, skip, Verdict.ACCEPT], "a level that stays"
    assert judged(Guard(2, never), [3.0] * 20 + [9.0])[-1] is Verdict.ACCEPT, "too early to know what is usual"
    once = Guard(2, SpikeOptions(skips=1, rewinds=1, rate=0.25))
    verdicts = judged(once, [*calm, 9.0, 9.0, *calm[40:], math.nan, math.nan])
    assert verdicts[64:66] == [skip, Verdict.REWIND]
    assert set(verdicts[66:-2]) == {Verdict.ACCEPT}
    assert once.rate([]) == 0.25
    assert once.rate([{"step": 1, "rewinds": 1}]) == 0.25
    with pytest.raises(DivergedError):
        judged(once, [*calm, *[math.nan] * 4])
    forever = Guard(1, SpikeOptions(rewinds=2))
    assert judged(forever, [*calm, math.nan, math.nan])[64:] == [skip, Verdict.REWIND]


def test_stopping_waits_for_its_patience() -> None:
    def rows(losses: list[float]) -> list[dict[str, float]]:
        return [{"step": 10.0 * (i + 1), "tokens": 1e4 * (i + 1), "heldout_loss": v} for i, v in enumerate(losses)]

    options = StopOptions(every=10, patience=2, min_delta=0.05)
    falling = [3.0, 2.9, 2.8, 2.7]
    assert stop_reason(options, rows(falling)) == ""
    assert stop_reason(options, rows([*falling, 2.69])) == ""
    assert "has not fallen by 0.05 in 2 evaluations (best 2.7" in stop_reason(options, rows([*falling, 2.69, 2.68]))
    assert stop_reason(options, [*rows([*falling, 2.69, 2.68]), {"step": 61.0}]) == "", (
        "only at an evaluation of its own"
    )
    assert stop_reason(None, rows([1.0] * 9)) == ""
    flat = [2 + 3 * (i + 1) ** -1.0 for i in range(12)]
    assert stop_reason(StopOptions(every=10, gain=0.01), rows(flat)) == ""
    assert "doubling buys" in stop_reason(StopOptions(every=10, gain=0.5), rows(flat))
    assert stop_reason(StopOptions(every=10, gain=0.5), rows(flat[:5])) == "", "too few points"


def test_profiles_are_written_as_a_range() -> None:
    read = ProfileOptions.model_validate
    assert read("steps=10..12") == read("10..12") == ProfileOptions(first=10, last=12)
    for wrong in ("10-12", "12..10", "steps=1..2"):
        with pytest.raises(ValidationError):
            read(wrong)


class Numbers:
    """Sequences whose tokens are their own index."""

    def __len__(self) -> int:
        return 50

    def batch(self, indices: object) -> dict[str, np.ndarray]:
        rows = np.asarray(indices, dtype=np.int64)[:, None].repeat(4, 1)
        return {"input_ids": rows, "document_ids": np.zeros_like(rows, dtype=np.int32)}


def feed(seed: int, batch: int, micro: int | None, rank: int, workers: int) -> Feed:
    order = make_order(Numbers(), TrainOptions(seed=seed, global_batch=batch))
    return Feed(Numbers(), order, micro, rank, workers, torch.device("cpu"))


@pytest.mark.parametrize("batch", [3, 8, 9])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_share_a_batch_that_does_not_depend_on_their_number(batch: int, workers: int) -> None:
    whole = feed(7, batch, 100, 0, 1).load(5)[0]["input_ids"][:, 0].tolist()
    shared, passes = [], set()
    for rank in range(workers):
        parts = feed(7, batch, 2, rank, workers).load(5)
        passes.add(len(parts))
        for part in parts:
            counted = part["document_ids"][:, 0] >= 0
            shared += part["input_ids"][counted, 0].tolist()
    assert shared == whole
    assert len(passes) == 1, "every worker makes the same number of passes"


def test_feed_reads_ahead_and_refuses_too_many_workers() -> None:
    with feed(0, 4, None, 0, 1) as ahead:
        for step in range(3):
            got = ahead.take(step, more=True)[0]
            assert torch.equal(got[0]["input_ids"], ahead.load(step)[0]["input_ids"])
    with pytest.raises(ResourceError, match="cannot feed 4 workers"):
        feed(0, 3, None, 0, 4)


def test_mesh_degrees_multiply_to_the_workers() -> None:
    def used(options: ParallelOptions, workers: int) -> dict[str, int]:
        return {name: size for name, size in degrees(options, workers).items() if size > 1}

    assert used(ParallelOptions(), 8) == {"shard": 8}
    assert used(ParallelOptions(data=2), 8) == {"data": 2, "shard": 4}
    assert used(ParallelOptions(tensor=2, pipeline=2), 8) == {"pipeline": 2, "shard": 2, "tensor": 2}
    for wrong in (ParallelOptions(data=3), ParallelOptions(shard=4), ParallelOptions(data=2, shard=2)):
        with pytest.raises(ResourceError, match="but there are 8 workers"):
            degrees(wrong, 8)


def test_meter_ignores_the_first_step() -> None:
    meter = Meter(100)
    for seconds in (50.0, 2.0, 2.0):
        meter.update(seconds, 0.5)
    assert meter.mean_tokens_per_second == 50
    assert meter.tokens_per_second == pytest.approx(50)
    assert meter.eta(10) == pytest.approx(20)


def test_report_is_one_page_of_escaped_text_and_curves() -> None:
    html = Page(
        "<b>run</b>", [("loss", "1 < 2")], [("Loss", [Line("train & test", [(i, 1 / (i + 1)) for i in range(2000)])])]
    ).html()
    assert "&lt;b&gt;run" in html
    assert "1 &lt; 2" in html
    assert "train &amp; test" in html
    assert html.count("<polyline") == 1
    assert "nothing to draw" in plot([Line("empty", [])])
    assert "<circle" in plot([Line("one", [(1, math.nan), (2, 3.0)])])
    assert len(thin([(float(i), 1.0) for i in range(5000)])) <= 600
