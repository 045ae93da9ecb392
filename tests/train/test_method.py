"""What may change how a run trains: batch warm-up, mixtures, averages, fp16, streams; all resume exactly."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training_parts import LENGTH, VOCABULARY, pretraining, tokenizer, write_tokens

from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.models import load_model
from modelyard.tokens import Sequences, TokenDataset, TokenWriter, rank_slice
from modelyard.tokens.tokenizer import save_tokenizer
from modelyard.train.batch_plan import BatchPlan
from modelyard.train.checkpoint import Keep
from modelyard.train.data import Feed, StreamFeed, make_order
from modelyard.train.loop import Outcome
from modelyard.train.metrics import StepMetrics
from modelyard.train.options import TrainOptions
from modelyard.train.programs import PretrainJob, pretrain
from modelyard.train.range_test import RangeTest, judge, range_test
from modelyard.train.schedule import make_schedule
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Stop(Exception):
    """Stands for a crash."""


def crash_after(step: int) -> Callable[[StepMetrics], None]:
    def sink(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise Stop

    return sink


def losses(outcome: Outcome) -> list[float]:
    return [row["loss"] for row in outcome.history]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of two sources: `low` holds small ids, `high` large ones."""
    folder = write_tokens(tmp_path_factory.mktemp("sources"))
    random, writer = np.random.default_rng(0), TokenWriter(folder / "train", LENGTH, VOCABULARY)
    for name, low, n in (("low", 8, 30), ("high", 150, 20)):
        rows = random.integers(low, low + 140, (n, LENGTH))
        writer.add(Sequences(rows, np.zeros((n, LENGTH), dtype=bool), np.full(n, LENGTH)), name, n, n)
    writer.close()
    save_tokenizer(tokenizer(), folder / "tokenizer")
    return folder


METHODS: dict[str, dict[str, Any]] = {
    "beside": {"async_checkpoints": True},
    "fp16": {"precision": "fp16"},
    "averages": {"ema": {"decay": 0.9}},
    "batch warm-up": {"batch_warmup": {"sequences": 2, "steps": 7}},
    "mixture": {"mixture": {"schedule": [{"step": 0, "weights": {"low": 1}}, {"step": 9, "weights": {"high": 1}}]}},
    "muon": {"optimizer": "muon"},
    "adafactor": {"optimizer": "adafactor", "schedule": "one-cycle", "warmup": 0.3},
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_resumes_bit_for_bit(sources: Path, tmp_path: Path, method: str) -> None:
    options = {"steps": 9, "checkpoint_every": 3, **METHODS[method]}
    whole = pretrain(pretraining(sources, tmp_path / "whole", **options), ALONE)
    job, said = pretraining(sources, tmp_path / "cut", **options), list[str]()
    with pytest.raises(Stop):
        pretrain(job, ALONE, crash_after(5))
    resumed = pretrain(job, ALONE, say=said.append)
    assert "resumed from step-00000003" in said[0]
    assert losses(resumed) == losses(whole)
    assert losses(whole)[-1] < losses(whole)[0]
    assert resumed.heldout_loss == whole.heldout_loss
    ids = torch.arange(20)[None]
    models = [load_model(tmp_path / name / "model") for name in ("whole", "cut")]
    assert torch.equal(models[0](input_ids=ids).logits, models[1](input_ids=ids).logits)


def test_averages_are_exported_and_evaluated(tokens: Path, tmp_path: Path) -> None:
    plain = pretrain(pretraining(tokens, tmp_path / "plain"), ALONE)
    averaged = pretrain(pretraining(tokens, tmp_path / "ema", ema={"decay": 0.5}), ALONE)
    assert losses(averaged) == losses(plain), "averaging does not touch training"
    assert averaged.heldout_loss != plain.heldout_loss
    kept = pretrain(pretraining(tokens, tmp_path / "kept", ema={"decay": 0.5, "export": False}), ALONE)
    assert kept.heldout_loss == plain.heldout_loss


def test_a_checkpoint_without_averages_is_not_enough_for_a_run_that_wants_them(tokens: Path, tmp_path: Path) -> None:
    job = pretraining(tokens, tmp_path, steps=4)
    pretrain(job, ALONE)
    wants = PretrainJob(**{**job.model_dump(), "train": {**job.train.model_dump(), "ema": {"decay": 0.5}}})
    with pytest.raises(DataError, match="does not hold what this run needs"):
        pretrain(wants, ALONE)


class Call:
    def __reduce__(self) -> Any:
        return os.getpgid, (0,)  # not a name that Ray replaces in a process that has used it, as `print`


def test_an_index_that_would_run_something_is_refused(tokens: Path, tmp_path: Path) -> None:
    import json

    from modelyard.storage.publish import checksum

    job = pretraining(tokens, tmp_path, steps=4)
    pretrain(job, ALONE)
    folder = tmp_path / "checkpoints" / "step-00000004"
    (folder / ".metadata").write_bytes(pickle.dumps(Call()))
    marker = json.loads((folder / "complete.json").read_text())
    marker["files"][".metadata"] = {
        "bytes": (folder / ".metadata").stat().st_size,
        "checksum": checksum(str(folder / ".metadata")),
    }
    (folder / "complete.json").write_text(json.dumps(marker))
    with pytest.raises(DataError, match=r"names posix\.getpgid"):
        pretrain(job, ALONE)


def test_fp8_without_the_hardware_is_refused(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="fp8 needs a GPU"):
        pretrain(pretraining(tokens, tmp_path, precision="fp8"), ALONE)


def test_what_is_kept_follows_the_policy(tokens: Path, tmp_path: Path) -> None:
    heldout = {1: None, 2: 3.0, 3: 2.0, 4: None, 5: 2.5, 6: 2.6, 7: None}
    assert Keep(2).chosen(heldout) == {6, 7}
    assert Keep(1, best=2).chosen(heldout) == {3, 5, 7}
    assert Keep(1, every=3).chosen(heldout) == {3, 6, 7}
    job = pretraining(tokens, tmp_path, steps=8, checkpoint_every=2, evaluate_every=2, keep_checkpoints=1, keep_best=1,
                      keep_every=4, async_checkpoints=True)  # fmt: skip
    history = pretrain(job, ALONE).history
    best = min((row["heldout_loss"], int(row["step"])) for row in history if "heldout_loss" in row)[1]
    names = {int(p.name[-8:]) for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {8, 4, best}


def test_a_batch_plan_counts_what_it_reads() -> None:
    plan = BatchPlan(8, 2, 5)
    sizes = [plan.size(step) for step in range(8)]
    assert sizes == [2, 3, 4, 5, 6, 8, 8, 8]
    assert [plan.before(step) for step in range(9)] == [0, *np.cumsum(sizes).tolist()]
    assert [plan.steps(n) for n in (1, 2, 3, 20, 21, 28, 29)] == [1, 1, 2, 5, 6, 6, 7]
    assert TrainOptions(tokens=1000, global_batch=5).total_steps(1, 10) == 20


def test_a_mixture_draws_its_shares(sources: Path) -> None:
    data = TokenDataset.open(sources / "train")
    order = make_order(data, TrainOptions(global_batch=8, mixture={"weights": {"low": 1.0, "high": 3.0}}))  # type: ignore[arg-type]
    drawn = np.concatenate([data.source_of(order(step)) for step in range(10)])
    assert np.bincount(drawn).tolist() == [20, 60]
    with pytest.raises(DataError, match="no source 'hgih'"):
        make_order(data, TrainOptions(mixture={"weights": {"hgih": 1.0}}))  # type: ignore[arg-type]


def test_one_cycle_is_torchs() -> None:
    steps, parameter = 20, torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1.0, total_steps=steps, pct_start=0.3, div_factor=25, final_div_factor=1 / 25 / 0.1
    )
    ours = make_schedule(TrainOptions(schedule="one-cycle", warmup=0.3, floor=0.1), steps)
    for step in range(steps):
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            torchs.step()


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_a_stream_feeds_what_a_worker_would_read_itself(tokens: Path, cut: int) -> None:
    """Sizes that do not divide, a share that is empty in one pass, a step gone back to, an end too early."""
    data = TokenDataset.open(tokens / "train")
    options = TrainOptions(global_batch=5, micro_batch=1)
    order, workers = make_order(data, options), 2

    def rows(first: int, rank: int) -> Iterator[dict[str, torch.Tensor]]:
        mine = np.concatenate([rank_slice(order(step), rank, workers) for step in range(first, 4)])
        for start in range(0, len(mine), cut):
            arrays = data.batch(mine[start : start + cut])
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    for rank in range(workers):
        opened: list[int] = []

        def open_at(step: int, rank: int = rank, opened: list[int] = opened) -> Iterator[dict[str, torch.Tensor]]:
            opened.append(step)
            return rows(step, rank)

        own = Feed(data, order, 1, rank, workers, torch.device("cpu"))
        with StreamFeed(open_at, options.batches.size, 1, rank, workers, torch.device("cpu")) as feed:
            for step in (1, 2, 3, 1, 2):
                parts, _ = feed.take(step, more=step != 3)
                for part, read in zip(parts, own.load(step), strict=True):
                    assert torch.equal(part["document_ids"], read["document_ids"]), (rank, step)
                    real = read["document_ids"] >= 0
                    assert torch.equal(part["input_ids"][real], read["input_ids"][real]), (rank, step)
            feed.take(3, more=True)
            with pytest.raises(DataError, match="ended before step 5"):
                feed.take(4, more=False)
        assert opened == [1, 1]


def test_a_range_test_suggests_a_rate_that_trains(tokens: Path, tmp_path: Path) -> None:
    job = pretraining(tokens, tmp_path)
    result = range_test(RangeTest(job=job, lowest=1e-4, highest=30.0, steps=60), ALONE)
    assert 1e-3 < result.suggestion < 1.0
    assert len(result.points) < 60 or result.points[-1][1] > min(loss for _, loss in result.points)
    assert "suggested learning_rate" in (tmp_path / "model" / "range_test.html").read_text()
    with pytest.raises(DataError, match="never fell"):
        judge([(0.1, 1.0), (0.2, 2.0), (0.3, 3.0)])
    with pytest.raises(RecipeError, match="lowest < highest"):
        range_test(RangeTest(job=job, lowest=1.0, highest=0.1), ALONE)
