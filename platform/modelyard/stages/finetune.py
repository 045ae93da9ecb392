"""Stage `finetune`: a model and pairs of prompt and answer become a model that answers."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelyard.align.options import ExampleOptions
from modelyard.errors import DataError, RecipeError
from modelyard.models.options import AdapterOptions
from modelyard.planner.estimate import Estimate
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.examples import Examples, guessed_sequences, name_of, read_examples, split
from modelyard.stages.training import (
    MODELS,
    TrainingStageOptions,
    check_training,
    clear,
    foreseen,
    known_model,
    model_config,
    model_place,
    predicted,
    speed_metrics,
    warnings,
)
from modelyard.stages.training_report import RESULTS, curves, write_results
from modelyard.storage import (
    Artifact,
    Files,
    download,
    exists,
    is_remote,
    join,
    read_bytes,
    upload,
    write_bytes,
)

if TYPE_CHECKING:
    from modelyard.train.loop import Outcome
    from modelyard.train.options import ParallelOptions
    from modelyard.train.pairs import Counts, Encoded, PackedPairs, Pair
    from modelyard.train.report import Page


class FinetuneOptions(TrainingStageOptions):
    """Supervised fine-tuning on completions only; the default budget is one epoch."""

    kind: Literal["finetune"] = Field(description="stage kind")
    adapter: AdapterOptions = Field(AdapterOptions(), description="what is trained: LoRA, or all with `lora: null`")
    examples: ExampleOptions = Field(ExampleOptions(), description="how records become token sequences")
    neftune: float = Field(
        0.0, ge=0, description="noise on the embeddings of training tokens (NEFTune, arXiv 2310.05914: 5); 0 = none"
    )
    add_tokens: tuple[str, ...] = Field(
        (), description="tokens the tokenizer lacks, such as <tool>; their rows of the embeddings begin as the mean of "
        "the others and are trained, beside LoRA too"
    )  # fmt: skip
    sequence_length: int = Field(
        512, ge=8, description="tokens of a packed sequence; longer pairs are cut, and counted"
    )
    heldout: float = Field(0.05, ge=0, lt=1, description="share of pairs held out, by a hash of their content")
    learning_rate: float = Field(1e-3, gt=0, description="peak rate (LoRA of small models: 1e-3; full: 1e-5 to 1e-4)")


class FinetuneStage(Stage[FinetuneOptions]):
    """See the module."""

    kind = "finetune"
    version = 2
    Options = FinetuneOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=MODELS, files=True),
        "data": InputSpec(kinds=("curate", "generate"), files=True),
    }

    def check(self, ctx: PlanContext[FinetuneOptions]) -> None:
        """Raises the errors of `check_training`, RecipeError for what learned vectors and new tokens cannot do, and
        DataError when the data is known to be empty."""
        adapter = ctx.options.adapter
        _check_adapter_layout(adapter, ctx.options.parallel)
        if ctx.options.add_tokens and (adapter.prompt is not None or adapter.ia3 is not None):
            raise RecipeError(
                "ia3 and learned vectors leave the embeddings of new tokens untrained",
                place="add_tokens",
                mend="use lora, or train all parameters (adapter: {lora: null})",
            )
        check_training(ctx.options, known_model(ctx), ctx.options.sequence_length, None)
        data = ctx.inputs.get("data")
        if isinstance(data, Artifact) and not data.manifest.counts.get("documents", 1):
            raise DataError("there are no pairs to train on", place=data.uri, mend="give more input or looser rules")

    def estimate(self, ctx: PlanContext[FinetuneOptions]) -> Estimate:
        """By the planner; a budget in epochs from the bytes of the data."""
        options, config = ctx.options, known_model(ctx)
        if config is None:
            return Estimate(notes=("size and time are known once its inputs are", *warnings(options)))
        sequences = guessed_sequences(ctx.inputs.get("data"), options.sequence_length, options.heldout)
        return foreseen(options, config, sequences, options.sequence_length, options.adapter, ctx.root)

    def leaves(self, ctx: PlanContext[FinetuneOptions]) -> Mapping[str, Any] | None:
        """That of its base, unless only learned vectors come out."""
        return None if ctx.options.adapter.prompt is not None else known_model(ctx)

    def run(self, ctx: StageContext[FinetuneOptions]) -> StageResult:
        """Encodes and packs the pairs, trains on Ray Train workers, writes models, held-out pairs and report."""
        from modelyard.stages.workers import Assignment, run_workers
        from modelyard.train.programs import FinetuneJob

        options = ctx.options
        for warning in warnings(options):
            ctx.progress.say(f"[yellow]warning[/]: {warning}")
        clear(ctx, "model", "adapter", "heldout.jsonl", "quarantine.jsonl", *RESULTS)
        facts = _prepare(ctx)
        place = model_place(ctx.inputs["model"], "model")
        job = FinetuneJob(
            model="",
            data="",
            output=ctx.output,
            train=options.training(),
            adapter=options.adapter,
            neftune=options.neftune,
            new_tokens=facts["new_tokens"],
            checkpoints=join(ctx.work, "checkpoints"),
            reports=ctx.output,
        )
        places: dict[str, tuple[Artifact, str] | str] = {"model": place, "data": join(ctx.work, "pairs")}
        steps = options.total_steps(facts["sequences"], options.sequence_length)
        estimate = _prediction(ctx, steps)
        outcome = run_workers(ctx, Assignment("modelyard.train.programs:finetune", job, places), steps, estimate)
        for name in ("heldout.jsonl", "quarantine.jsonl"):
            write_bytes(join(ctx.output, name), read_bytes(join(ctx.work, "pairs", name)))
        write_results(ctx, outcome, _page(ctx, outcome, facts), estimate)
        return _result(outcome, facts, options.adapter)


def _prediction(ctx: StageContext[FinetuneOptions], steps: int) -> Estimate | None:
    options, config = ctx.options, model_config(ctx.inputs.get("model"), "model")
    length = options.sequence_length
    return predicted(options, config, steps * options.global_batch * length, length, options.adapter, ctx.root)


def _prepare(ctx: StageContext[FinetuneOptions]) -> dict[str, Any]:
    """Packs the pairs into `work/pairs`, unless an earlier try has: what they came to is in `pairs.json`, last."""
    target = join(ctx.work, "pairs")
    if exists(join(target, "pairs.json")):
        facts: dict[str, Any] = json.loads(read_bytes(join(target, "pairs.json")))
        return facts
    facts = _pack(ctx, target)
    write_bytes(join(target, "pairs.json"), json.dumps(facts).encode())
    say_losses(ctx, facts, ctx.options.sequence_length)
    return facts


def say_losses(ctx: StageContext[Any], facts: Mapping[str, Any], length: int) -> None:
    """Tells the person what was cut, left out and quarantined: never silently."""
    cut, dropped, bad = facts["truncated"], facts["dropped"], facts["quarantined"]
    if cut or dropped:
        ctx.progress.say(f"{cut:,} pairs cut at {length} tokens, {dropped:,} left out whole")
    if bad:
        ctx.progress.say(f"[yellow]{bad:,} records cannot be used[/]: see quarantine.jsonl for places and reasons")


def _pack(ctx: StageContext[FinetuneOptions], target: str) -> dict[str, Any]:
    from modelyard.align.encode import use_template
    from modelyard.train.pairs import encode

    options = ctx.options
    examples = read_pairs(ctx.inputs["data"], options.examples)
    kept, held = split(examples.good, options.heldout)
    if not kept:
        raise DataError("there are no pairs to train on", place=name_of(ctx.inputs["data"]), mend="give more pairs")
    tokenizer = use_template(read_tokenizer(ctx.inputs["model"]), options.examples.template)
    extended = _extend(tokenizer, options.add_tokens)
    encoded, counts = encode(
        kept, tokenizer, options.sequence_length, options.examples.learn, options.examples.long == "drop"
    )
    pad = tokenizer.pad_token_id or 0
    train = _rows(encoded, options, pad)
    with tempfile.TemporaryDirectory() as folder:
        train.save(Path(folder) / "train.npz")
        unseen = _pack_heldout(ctx, held, tokenizer, pad, Path(folder))
        lines = "".join(json.dumps(pair.dump(), ensure_ascii=False) + "\n" for pair in held)
        (Path(folder) / "heldout.jsonl").write_text(lines, encoding="utf-8")
        (Path(folder) / "quarantine.jsonl").write_bytes(examples.quarantine())
        if extended is not None:
            tokenizer.save_pretrained(str(Path(folder) / "tokenizer"))
        upload(folder, target)
    return {
        "sequences": len(train),
        "filled": train.filled,
        "heldout_pairs": len(held),
        "heldout_truncated": unseen.truncated if unseen else 0,
        "quarantined": len(examples.bad),
        "new_tokens": extended,
        **asdict(counts),
    }


def _extend(tokenizer: Any, tokens: Sequence[str]) -> tuple[int, int] | None:
    """Adds special tokens to the tokenizer; the first of their ids and that behind the last, None without any.

    Raises:
        RecipeError: the tokenizer has one of them already.
    """
    if not tokens:
        return None
    known = [token for token in tokens if token in tokenizer.get_vocab()]
    if known:
        raise RecipeError(f"the tokenizer has the token {known[0]!r} already", place="add_tokens", mend="leave it out")
    first = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return first, max(tokenizer.get_vocab().values()) + 1


def _pack_heldout(
    ctx: StageContext[FinetuneOptions], held: list[Pair], tokenizer: Any, pad: int, folder: Path
) -> Counts | None:
    from modelyard.train.pairs import encode

    if not held:
        return None
    options = ctx.options
    encoded, counts = encode(
        held, tokenizer, options.sequence_length, options.examples.learn, options.examples.long == "drop"
    )
    _rows(encoded, options, pad).save(folder / "heldout.npz")
    return counts


def _rows(encoded: Sequence[Encoded], options: FinetuneOptions, pad: int) -> PackedPairs:
    """Packed, except for learned vectors, which stand before every row: there a row is one pair."""
    from modelyard.train.pairs import PackedPairs

    if options.adapter.prompt is not None:
        return PackedPairs.alone(encoded, options.seed, pad)
    return PackedPairs.pack(encoded, options.sequence_length, options.seed, pad)


def read_pairs(data: Artifact | Files, options: ExampleOptions) -> Examples[Pair]:
    """The examples to imitate that an input holds."""
    from modelyard.align.records import conversation

    return read_examples(data, lambda row, place: conversation(row, place, options.form), options.bad_rows)


def read_tokenizer(model: Artifact | Files) -> Any:
    """The transformers tokenizer of a model input. Raises DataError when the folder has none."""
    from transformers import AutoTokenizer

    place = model_place(model, "model")
    if not isinstance(place, str):
        folder = place[0].local(place[1])
    else:
        folder = download(place, tempfile.mkdtemp(prefix="modelyard-tokenizer-")) if is_remote(place) else Path(place)
    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"the model folder has no tokenizer: {error}", place=str(folder), mend="copy the tokenizer files into it"
        ) from error


def _check_adapter_layout(adapter: AdapterOptions, layout: ParallelOptions) -> None:
    """Raises RecipeError for a layout that the adapter does not have."""
    if not adapter.full and layout.pipeline > 1:
        raise RecipeError(
            "adapters are not cut into pipeline stages",
            place="parallel.pipeline",
            mend="use shard, data, tensor and context degrees, or train all parameters (adapter: {lora: null})",
        )
    if adapter.prompt is not None and layout.context > 1:
        raise RecipeError(
            "learned vectors need whole sequences on a worker",
            place="adapter.prompt",
            mend="use shard, data and tensor degrees, or lora",
        )


def _result(outcome: Outcome, facts: Mapping[str, Any], adapter: AdapterOptions) -> StageResult:
    heldout = outcome.heldout_loss
    metrics = {
        "loss": outcome.loss,
        **speed_metrics(outcome),
        "filled": float(facts["filled"]),
    }
    if heldout is not None:
        metrics["heldout_loss"] = heldout
    shown = "no held-out pairs" if heldout is None else f"held-out loss {heldout:.3f}"
    return StageResult(
        summary=f"{facts['pairs']:,} pairs, {outcome.trainable / 1e3:,.0f} k of {outcome.parameters / 1e6:.1f} M "
        f"parameters trained, {shown}",
        counts={
            "parameters": outcome.parameters,
            "trainable": outcome.trainable,
            "steps": outcome.steps,
            "pairs": int(facts["pairs"]),
            "heldout_pairs": int(facts["heldout_pairs"]),
            "truncated": int(facts["truncated"]),
            "dropped": int(facts["dropped"]),
            "quarantined": int(facts["quarantined"]),
            **({"adapter_only": 1} if adapter.prompt is not None else {}),
        },
        metrics=metrics,
    )


def _page(ctx: StageContext[FinetuneOptions], outcome: Outcome, facts: Mapping[str, Any]) -> Page:
    from modelyard.train.report import Page

    heldout = outcome.heldout_loss
    rows = [
        ("pairs", f"{facts['pairs']:,}, {facts['heldout_pairs']:,} more held out"),
        ("cut to fit", f"{facts['truncated']:,}"),
        ("left out, too long", f"{facts['dropped']:,}"),
        ("quarantined records", f"{facts['quarantined']:,}"),
        ("sequences filled", f"{facts['filled']:.0%}"),
        ("trained", f"{outcome.trainable:,} of {outcome.parameters:,} parameters, {outcome.steps:,} steps"),
        ("held-out loss", "none" if heldout is None else f"{heldout:.4f} nats an answer token"),
        ("last training loss", f"{outcome.loss:.4f}"),
        ("throughput", f"{outcome.tokens_per_second:,.0f} tokens a second on {ctx.options.resources.workers} workers"),
        ("time", f"{outcome.seconds:.0f} s"),
        *([("ended early", outcome.stopped)] if outcome.stopped else []),
    ]
    return Page(f"Fine-tuning: {ctx.name}", rows, curves(outcome.history))
