"""Whole jobs of alignment on packed answers, for any launcher: preferences, and reward models.

As in `train.programs`: a job is plain data, every process calls the program with its `World`, rank 0 reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from modelyard.align.logprobs import document_sums
from modelyard.align.objectives import (
    USES_REFERENCE,
    PreferenceObjective,
    ProcessObjective,
    RewardObjective,
    answers,
    document_rewards,
    token_rewards,
)
from modelyard.align.options import PreferenceOptions, RewardOptions
from modelyard.align.reward_model import load_classifier, write_classifier
from modelyard.align.reward_report import process_figures, reward_figures
from modelyard.align.steps import scored_steps
from modelyard.errors import RecipeError
from modelyard.models.build import check_shape
from modelyard.models.export import load_model, read_config
from modelyard.models.options import AdapterOptions
from modelyard.recipe.schema import Options
from modelyard.tokens import rank_slice
from modelyard.train.data import read
from modelyard.train.hooks import Hooks
from modelyard.train.loop import Outcome
from modelyard.train.metrics import Say, Sink, no_say, no_sink
from modelyard.train.objective import Objective
from modelyard.train.options import TrainOptions
from modelyard.train.pairs import PackedPairs
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.programs import Setup, adapted, identify, packed_pairs, run_loop, write_tuned, written
from modelyard.train.world import World


class PackedJob(Options):
    """A model folder trained on packed answers."""

    model: str = Field(description="local model folder, with tokenizer")
    data: str = Field(description="local folder with train.npz, and heldout.npz where there is any")
    output: str = Field(description="URI of the folder to write into")
    train: TrainOptions = Field(description="how to train")
    adapter: AdapterOptions = Field(AdapterOptions(), description="what is trained")
    checkpoints: str | None = Field(None, description="URI for checkpoints; null = none")
    reports: str | None = Field(None, description="URI of a folder for profiles and the stacks of a hang; null = none")


class PreferenceJob(PackedJob):
    """Preference optimization."""

    method: Literal["dpo", "ipo", "kto", "orpo", "simpo"] = Field(description="which loss")
    preference: PreferenceOptions = Field(PreferenceOptions(), description="its constants")


class RewardJob(PackedJob):
    """A reward model from a language model."""

    reward: RewardOptions = Field(RewardOptions(), description="constants of the loss")


def prefer(
    job: PreferenceJob, world: World, sink: Sink = no_sink, say: Say = no_say, hooks: Hooks | None = None
) -> Outcome:
    """Trains on preferences and writes `model/` and, with an adapter, `adapter/`.

    The reference is the model before training. `figures` of the outcome hold the held-out means after training, and
    before it as `before_*`.

    Raises:
        RecipeError: a reference by adapter without one, or a layout that splits sequences or layers.
        DataError, ResourceError, DivergedError: as `train.programs.finetune`.
    """
    check_alignment(job.train, job.adapter, job.preference if job.method in USES_REFERENCE else None)
    source = Path(job.model)
    data, heldout = packed_pairs(Path(job.data))
    plain = load_model(source)
    check_shape(plain.config, data.longest)
    strategy = adapted(plain, job.adapter, job.train, world)
    if job.method in USES_REFERENCE and job.preference.reference == "precomputed":
        if world.leads:
            say(f"computing the reference's log-probabilities of {len(data):,} sequences, once")
        data = _with_reference(strategy, data, job.train)
        heldout = _with_reference(strategy, heldout, job.train) if heldout is not None else None
    objective = PreferenceObjective(job.method, job.preference)
    config = read_config(source)
    outcome = _train(
        job, strategy, objective, identify(config, objective, job.adapter), data, heldout, sink, say, hooks
    )
    state = strategy.full_state(trainable_only=not job.adapter.full)
    if world.leads:
        with written(job.output) as target:
            write_tuned(source, job.adapter, job.train.seed, config, state, target)
    world.barrier()
    return outcome


def train_reward(
    job: RewardJob, world: World, sink: Sink = no_sink, say: Say = no_say, hooks: Hooks | None = None
) -> Outcome:
    """Trains a reward model and writes `model/`, a transformers sequence classifier of one output; with
    `reward.process` on rows with `step_labels`. Raises as :func:`prefer`."""
    check_alignment(job.train, job.adapter, None)
    source = Path(job.model)
    data, heldout = packed_pairs(Path(job.data))
    plain = load_classifier(source, job.train.seed)
    check_shape(plain.config, data.longest)
    strategy = adapted(plain, job.adapter, job.train, world, "SEQ_CLS")
    process = job.reward.process
    objective: Objective = RewardObjective(job.reward) if process is None else ProcessObjective()
    identity = identify(plain.config, objective, job.adapter)
    outcome = _train(job, strategy, objective, identity, data, heldout, sink, say, hooks)
    if heldout is not None:
        found = _pair_figures if process is None else _step_figures
        figures = found(strategy, heldout, job.train.micro_batch or 16)
        outcome = replace(outcome, figures=outcome.figures | figures)
    state = strategy.full_state(trainable_only=not job.adapter.full)
    if world.leads:
        with written(job.output) as target:
            separator = None if process is None else process.separator
            write_classifier(source, job.adapter, job.train.seed, state, target / "model", separator)
    world.barrier()
    return outcome


def check_alignment(train: TrainOptions, adapter: AdapterOptions, preference: PreferenceOptions | None) -> None:
    """Raises RecipeError for what alignment cannot do: layouts that split sequences or layers, vectors before packed
    rows, no adapter to switch off."""
    if adapter.prompt is not None:
        raise RecipeError(
            "learned vectors stand before every row, and rows here hold several answers",
            place="adapter.prompt",
            mend="use lora or ia3; learned vectors are for finetune",
        )
    if train.parallel.pipeline > 1 or train.parallel.context > 1:
        raise RecipeError(
            "alignment needs whole sequences and whole models on a worker (or sharded ones)",
            place="parallel",
            mend="use shard, data and tensor degrees",
        )
    if train.objective is not None:
        raise RecipeError("the method is the objective", place="objective", mend="leave objective out")
    if preference is not None and preference.reference == "adapter" and adapter.full:
        raise RecipeError(
            "there is no adapter to switch off",
            place="preference.reference",
            mend="use reference: precomputed, or train an adapter",
        )


def _train(
    job: PackedJob,
    strategy: Strategy,
    objective: Objective,
    identity: str,
    data: PackedPairs,
    heldout: PackedPairs | None,
    sink: Sink,
    say: Say,
    hooks: Hooks | None,
) -> Outcome:
    """The loop, with held-out means before and after it."""
    setup = Setup(
        job.train, objective, identity, job.checkpoints, data.sequence_length, job.reports, Path(job.model)
    )  # fmt: skip
    batch = job.train.micro_batch or 16
    before = measure(strategy, objective, heldout, batch) if heldout is not None else {}
    outcome = run_loop(setup, strategy, data, heldout, sink, say, hooks)
    after = measure(strategy, objective, heldout, batch) if heldout is not None else {}
    return replace(outcome, figures={f"before_{name}": value for name, value in before.items()} | after)


def measure(strategy: Strategy, objective: Objective, data: PackedPairs, batch: int) -> dict[str, float]:
    """Means of everything an objective reports over all sequences, the same on every worker."""
    sums: dict[str, torch.Tensor] = {}

    def take(rows: dict[str, torch.Tensor], _: Any) -> None:
        for name, value in strategy.evaluate(objective, rows).items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.cpu()

    _walk(strategy, data, batch, take)
    totals = strategy.world.add(torch.stack(list(sums.values())).to(strategy.world.device)).tolist()
    means = dict(zip(sums, totals, strict=True))
    weight = means.pop("weight")
    return {name: value / weight if weight else math.nan for name, value in means.items()}


def _pair_figures(strategy: Strategy, data: PackedPairs, batch: int) -> dict[str, float]:
    pairs = _rewards(strategy, data, batch)
    return reward_figures(pairs[:, 0], pairs[:, 1])


def _step_figures(strategy: Strategy, data: PackedPairs, batch: int) -> dict[str, float]:
    found: list[npt.NDArray[np.float64]] = []

    def take(rows: dict[str, torch.Tensor], _: Any) -> None:
        scores = token_rewards(strategy.model, rows).sigmoid()
        found.extend(scored_steps({name: value.cpu().numpy() for name, value in rows.items()}, scores.cpu().numpy()))

    _walk(strategy, data, batch, take)
    return process_figures([answer for part in strategy.world.gather(found) for answer in part])


def _rewards(strategy: Strategy, data: PackedPairs, batch: int) -> npt.NDArray[np.float64]:
    """Rewards and answer lengths of all pairs, [pairs, 2 (reward, tokens), 2 (chosen, rejected)], on every worker."""
    found: list[list[list[float]]] = []

    def take(rows: dict[str, torch.Tensor], indices: Any) -> None:
        rewards, present = document_rewards(strategy.model, rows)
        tokens = document_sums(rows["loss_mask"].float(), rows["document_ids"], rewards.shape[1])
        both = present[:, 0::2] & present[:, 1::2]
        sides = [torch.stack([v[:, 0::2][both], v[:, 1::2][both]], dim=1) for v in (rewards, tokens)]
        found.extend(torch.stack(sides, dim=1).tolist())

    _walk(strategy, data, batch, take)
    return np.asarray([pair for part in strategy.world.gather(found) for pair in part]).reshape(-1, 2, 2)


def _with_reference(strategy: Strategy, data: PackedPairs, train: TrainOptions) -> PackedPairs:
    """The log-probability of every answer under the model as it is now, as `reference`."""
    found = torch.zeros(len(data), data.most_documents, dtype=torch.float32, device=strategy.world.device)
    copies = strategy.world.size / strategy.readers

    def take(rows: dict[str, torch.Tensor], indices: Any) -> None:
        logprobs = answers(strategy.model, rows).logprobs
        if len(indices):
            found[torch.from_numpy(indices).to(found.device), : logprobs.shape[1]] = logprobs / copies

    _walk(strategy, data, train.micro_batch or 16, take)
    return data.with_values("reference", strategy.world.add(found).cpu().numpy())


@torch.no_grad()
def _walk(
    strategy: Strategy, data: PackedPairs, batch: int, take: Callable[[dict[str, torch.Tensor], Any], None]
) -> None:
    """Every sequence once, shared between the workers, which all make the same number of forward passes."""
    model, training = strategy.model, strategy.model.training
    mine = rank_slice(np.arange(len(data), dtype=np.int64), strategy.reader, strategy.readers)
    rounds = math.ceil(math.ceil(len(data) / strategy.readers) / batch)
    model.eval()
    for part in np.array_split(mine, rounds):
        take(read(cast(Any, data), part, strategy.world.device), part)
    model.train(training)
