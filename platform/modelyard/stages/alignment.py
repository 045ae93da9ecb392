"""What `align` and `reward` share: preferences and opinions packed for the loop, and what a run came to."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelyard.align.options import ExampleOptions
from modelyard.errors import DataError, RecipeError
from modelyard.models.options import AdapterOptions
from modelyard.planner.estimate import Estimate
from modelyard.stages.base import PlanContext, StageContext, StageResult
from modelyard.stages.examples import guessed_sequences, name_of, read_examples, split
from modelyard.stages.finetune import read_tokenizer, say_losses
from modelyard.stages.training import (
    TrainingStageOptions,
    check_training,
    foreseen,
    known_model,
    model_config,
    planned_device,
    planned_precision,
    predicted,
    speed_metrics,
    warnings,
)
from modelyard.stages.training_report import curves
from modelyard.storage import Artifact, exists, join, read_bytes, upload, write_bytes

if TYPE_CHECKING:
    from modelyard.align.records import Feedback, Preference
    from modelyard.train.loop import Outcome
    from modelyard.train.pairs import Counts, Encoded
    from modelyard.train.report import Page

Facts = dict[str, Any]

_TOKEN_BYTES = 2.0
"""Of preferences, a token: their prompt is written once and encoded twice (measured: 160 short pairs)."""


class AlignmentOptions(TrainingStageOptions):
    """What the stages on preferences have; the default budget is one epoch."""

    adapter: AdapterOptions = Field(AdapterOptions(), description="what is trained: LoRA, or all with `lora: null`")
    examples: ExampleOptions = Field(ExampleOptions(), description="how records become token sequences")
    sequence_length: int = Field(
        512, ge=8, description="tokens of one conversation with its answer; longer ones are cut, and counted"
    )
    heldout: float = Field(0.05, ge=0, lt=1, description="share of examples held out, by a hash of the prompt")


def check_alignment_stage(ctx: PlanContext[Any]) -> None:
    """Refuses what can be seen to fail before any work.

    Raises:
        RecipeError: a layout or objective that alignment does not have, sequences longer than the model's.
        DataError: the data are known to be empty.
        ResourceError: as `check_training`.
    """
    options: AlignmentOptions = ctx.options
    if options.adapter.prompt is not None:
        raise RecipeError(
            "learned vectors stand before every row, and rows here hold several answers",
            place="adapter.prompt",
            mend="use lora or ia3; learned vectors are for finetune",
        )
    if options.parallel.pipeline > 1 or options.parallel.context > 1:
        raise RecipeError(
            "alignment needs whole sequences and layers on a worker", place="parallel", mend="use shard, data, tensor"
        )
    for name in ("objective", "mixture", "denoising", "batch_warmup"):
        if getattr(options, name) is not None:
            raise RecipeError(f"{name} has no meaning here: the method decides", place=name, mend=f"leave {name} out")
    check_training(options, known_model(ctx), options.sequence_length, None)
    data = ctx.inputs.get("data")
    if isinstance(data, Artifact) and not data.manifest.counts.get("documents", 1):
        raise DataError("there is nothing to train on", place=data.uri, mend="give more input or looser rules")


def estimate_alignment(ctx: PlanContext[Any], reference: bool = False) -> Estimate:
    """By the planner; rows hold two conversations. A budget in epochs from the bytes of the data. With a `reference`
    one forward pass over every row besides."""
    options: AlignmentOptions = ctx.options
    config, length = known_model(ctx), 2 * options.sequence_length
    if config is None:
        return Estimate(notes=("size and time are known once its inputs are", *warnings(options)))
    sequences = guessed_sequences(ctx.inputs.get("data"), length, options.heldout, _TOKEN_BYTES)
    found = foreseen(options, config, sequences, length, options.adapter, ctx.root)
    return _with_reference(found, ctx.options, config, length, ctx.root) if reference else found


def _with_reference(
    found: Estimate, options: AlignmentOptions, config: Mapping[str, Any], length: int, root: str
) -> Estimate:
    """The estimate and the forward passes of the model before training, where the number of tokens is known."""
    from modelyard.planner import formatting as fmt
    from modelyard.planner.flops import flops_per_token
    from modelyard.planner.time import forward_seconds

    if found.tokens is None:
        return found
    device, workers = planned_device(options, root), options.resources.workers
    seconds = forward_seconds(
        config, found.tokens / workers, sequence_length=length, hardware=device,
        precision_name=planned_precision(options),
    )  # fmt: skip
    longer = found.longer(seconds, flops_per_token(config, length).forward * found.tokens)
    note = f"the reference's log-probabilities take {fmt.duration(seconds)} of it"
    return replace(longer, notes=(*longer.notes, note))


def prediction(ctx: StageContext[Any], steps: int) -> Estimate | None:
    """What the planner says of this run, now that its data are there."""
    options: AlignmentOptions = ctx.options
    config = model_config(ctx.inputs.get("model"), "model")
    length = 2 * options.sequence_length
    return predicted(options, config, steps * options.global_batch * length, length, options.adapter, ctx.root)


def prepared(ctx: StageContext[Any], pack: Callable[[StageContext[Any], Path], Facts]) -> Facts:
    """What `pack` says of the data it writes into a folder, kept under `work/answers` for the next try."""
    target = join(ctx.work, "answers")
    if exists(join(target, "facts.json")):
        found: Facts = json.loads(read_bytes(join(target, "facts.json")))
        return found
    with tempfile.TemporaryDirectory() as folder:
        facts = pack(ctx, Path(folder))
        upload(folder, target)
    write_bytes(join(target, "facts.json"), json.dumps(facts).encode())
    say_losses(ctx, facts, ctx.options.sequence_length)
    return facts


def pack_preferences(ctx: StageContext[Any], folder: Path) -> Facts:
    """Preferences as (chosen, rejected) in `train.npz` and `heldout.npz`."""
    from modelyard.align.encode import encode_preferences
    from modelyard.align.records import preference

    def values(examples: Sequence[Preference]) -> Mapping[str, list[list[float]]]:
        return {"margin": [[e.margin, e.margin] for e in examples]}

    return _pack(ctx, folder, preference, encode_preferences, values)


def pack_steps(ctx: StageContext[Any], folder: Path) -> Facts:
    """Answers whose steps have labels."""
    from modelyard.align.encode import use_template
    from modelyard.align.steps import StepReader, cut_steps

    options = ctx.options
    tokenizer = use_template(read_tokenizer(ctx.inputs["model"]), options.examples.template)
    reader = StepReader(tokenizer, options.reward.process.separator, options.sequence_length)
    return _pack(ctx, folder, reader, cut_steps, lambda _: {})


def pack_feedback(ctx: StageContext[Any], folder: Path) -> Facts:
    """Opinions as (answer, mismatched answer) with their labels."""
    from modelyard.align.encode import encode_feedback
    from modelyard.align.records import feedback

    def values(examples: Sequence[Feedback]) -> Mapping[str, list[list[float]]]:
        return {"label": [[float(e.label)] * 2 for e in examples]}

    return _pack(ctx, folder, feedback, encode_feedback, values)


def _pack(ctx: StageContext[Any], folder: Path, parse: Any, encode: Any, values: Any) -> Facts:
    import numpy as np

    from modelyard.align.encode import use_template
    from modelyard.train.pairs import PackedPairs

    options: AlignmentOptions = ctx.options
    data = ctx.inputs["data"]
    examples = read_examples(data, parse, options.examples.bad_rows)
    kept, held = split(examples.good, options.heldout)
    if not kept:
        raise DataError("there is nothing to train on", place=name_of(data), mend="give more examples")
    tokenizer = use_template(read_tokenizer(ctx.inputs["model"]), options.examples.template)
    facts: Facts = {"quarantined": len(examples.bad)}
    (folder / "quarantine.jsonl").write_bytes(examples.quarantine())
    lines = "".join(json.dumps(example.dump(), ensure_ascii=False) + "\n" for example in held)
    (folder / "heldout.jsonl").write_text(lines, encoding="utf-8")
    for name, part in (("train", kept), ("heldout", held)):
        if not part:
            continue
        groups: list[tuple[Encoded, ...]]
        counts: Counts
        groups, indices, counts = encode(part, tokenizer, options.sequence_length, options.examples.long == "drop")
        arrays = {k: np.asarray(v, dtype=np.float32) for k, v in values([part[i] for i in indices]).items()}
        length = 2 * options.sequence_length
        packed = PackedPairs.pack_groups(groups, length, options.seed, tokenizer.pad_token_id or 0, arrays)
        packed.save(folder / f"{name}.npz")
        if name == "train":
            facts |= {"sequences": len(packed), "filled": packed.filled, "heldout_pairs": len(held), **asdict(counts)}
    return facts


def copy_facts(ctx: StageContext[Any]) -> None:
    """Held-out examples and the quarantine, into the artifact."""
    for name in ("heldout.jsonl", "quarantine.jsonl"):
        write_bytes(join(ctx.output, name), read_bytes(join(ctx.work, "answers", name)))


def result(outcome: Outcome, facts: Facts, shown: str) -> StageResult:
    """Counts and metrics of a run on packed examples."""
    figures = {f"heldout_{name}": value for name, value in outcome.figures.items()}
    return StageResult(
        summary=f"{facts['pairs']:,} examples, {outcome.trainable / 1e3:,.0f} k of {outcome.parameters / 1e6:.1f} M "
        f"parameters trained, {shown}",
        counts={
            "parameters": outcome.parameters,
            "trainable": outcome.trainable,
            "steps": outcome.steps,
            **{name: int(facts[name]) for name in ("pairs", "heldout_pairs", "truncated", "dropped", "quarantined")},
        },
        metrics={"loss": outcome.loss, **speed_metrics(outcome), "filled": float(facts["filled"]), **figures},
    )


def page(ctx: StageContext[Any], outcome: Outcome, facts: Facts, title: str) -> Page:
    """The report of a run on packed examples: facts, held-out figures before and after, curves."""
    from modelyard.train.report import Line, Page, Table

    rows = [
        ("examples", f"{facts['pairs']:,}, {facts['heldout_pairs']:,} more held out"),
        ("cut to fit", f"{facts['truncated']:,}"),
        ("left out, too long or nothing to learn after cutting", f"{facts['dropped']:,}"),
        ("quarantined records", f"{facts['quarantined']:,}"),
        ("trained", f"{outcome.trainable:,} of {outcome.parameters:,} parameters, {outcome.steps:,} steps"),
        ("last training loss", f"{outcome.loss:.4f}"),
        ("time", f"{outcome.seconds:.0f} s"),
        *([("ended early", outcome.stopped)] if outcome.stopped else []),
    ]
    after = {name: value for name, value in outcome.figures.items() if not name.startswith("before_")}
    measured = [(n, f"{outcome.figures.get(f'before_{n}', float('nan')):.4f}", f"{v:.4f}") for n, v in after.items()]
    tables = (Table("Held-out, before and after", ("", "before", "after"), measured),) if measured else ()
    plots = list(curves(outcome.history))
    for name in ("accuracy", "margin"):
        points = [(row["step"], row[name]) for row in outcome.history if name in row]
        if points:
            plots.insert(1, (f"Training {name}, by step", [Line(name, points, "#15803d")]))
    return Page(f"{title}: {ctx.name}", rows, plots, tables=tables)
