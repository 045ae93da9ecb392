"""Stage `pretrain`: token shards become a model, from fresh weights or from another model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from modelyard.errors import RecipeError
from modelyard.models.options import ModelOptions
from modelyard.models.presets import learning_rate, parameters_of
from modelyard.models.vocabulary import folder_extends
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import runtime
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.training import (
    Config,
    TrainingStageOptions,
    check_training,
    clear,
    known_model,
    model_config,
    model_place,
    planned_config,
    predict,
    predicted,
    speed_metrics,
    warnings,
)
from modelyard.stages.training_report import RESULTS, curves, write_results
from modelyard.storage import Artifact, join, read_bytes

if TYPE_CHECKING:
    from modelyard.train.loop import Outcome
    from modelyard.train.report import Page


class PretrainOptions(TrainingStageOptions):
    """Causal language modelling; the default budget is one epoch."""

    kind: Literal["pretrain"] = Field(description="stage kind")
    model: ModelOptions | None = Field(
        None,
        description="the model to build; with an input `model` it takes over what fits of that by name and shape; "
        "null = continue the input `model` as it is",
    )
    stream: bool = runtime(
        False,
        "training sequences are read by Ray Data where they lie, instead of being copied to every worker's disk; the "
        "same batches in the same order",
    )

    @model_validator(mode="before")
    @classmethod
    def _rate_of_size(cls, value: Any) -> Any:
        """A model given by its size alone brings a learning rate, unless one is given."""
        model = value.get("model") if isinstance(value, dict) else None
        if not isinstance(model, dict) or "size" not in model or "learning_rate" in value:
            return value
        try:
            return {**value, "learning_rate": learning_rate(parameters_of(str(model["size"])))}
        except ValueError:
            return value  # The model's own check says what is wrong with it.


class PretrainStage(Stage[PretrainOptions]):
    """See the module."""

    kind = "pretrain"
    version = 2
    Options = PretrainOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "tokens": InputSpec(kinds=("tokenize",)),
        "model": InputSpec(kinds=("pretrain", "finetune", "align", "merge"), files=True, required=False),
    }
    more = InputSpec(kinds=("tokenize",))

    def check(self, ctx: PlanContext[PretrainOptions]) -> None:
        """Raises the errors of `check_training`; RecipeError when there is neither model nor input `model`; DataError
        when several tokens are known not to go together."""
        options = ctx.options
        if options.model is None and "model" not in options.inputs:
            raise RecipeError(
                "no model is given", place="model", mend="give model (preset or config) or an input model"
            )
        _check_stream(options)
        _check_alike(_token_inputs(ctx))
        length, vocabulary = token_shape(ctx)
        check_training(options, _config(ctx), length, None if _extends(ctx) else vocabulary)

    def estimate(self, ctx: PlanContext[PretrainOptions]) -> Estimate:
        """By the planner; tokens need a budget in steps or tokens, or the tokens themselves."""
        config, (length, _) = _config(ctx), token_shape(ctx)
        tokens = _tokens(ctx, length)
        if config is None or length is None or tokens is None:
            notes = ("size and time are known once its inputs are", *warnings(ctx.options))
            return Estimate(tokens=tokens, notes=notes)
        return predict(ctx.options, config, tokens, length, root=ctx.root)

    def leaves(self, ctx: PlanContext[PretrainOptions]) -> Mapping[str, Any] | None:
        """That of the model it trains, once its vocabulary is known."""
        model = ctx.options.model
        unknown = model is not None and token_shape(ctx)[1] is None and "vocab_size" not in model.settings()
        return None if unknown else _config(ctx)

    def run(self, ctx: StageContext[PretrainOptions]) -> StageResult:
        """Trains on Ray Train workers and writes model, loss table and report."""
        from modelyard.stages.workers import Assignment, run_workers
        from modelyard.train.programs import PretrainJob

        options, facts = ctx.options, _joined_facts(_token_inputs(ctx))
        for warning in warnings(options):
            ctx.progress.say(f"[yellow]warning[/]: {warning}")
        steps = options.total_steps(int(facts["train_sequences"]), int(facts["sequence_length"]))
        job = PretrainJob(
            tokens="",
            output=join(ctx.output, "model"),
            train=options.training(),
            stream=ctx.artifact("tokens").join("train") if options.stream else None,
            model=options.model,
            checkpoints=join(ctx.work, "checkpoints"),
            reports=ctx.output,
        )
        clear(ctx, "model", *RESULTS)
        estimate = _prediction(ctx, steps, facts)
        places = job_places(ctx)
        if options.stream:
            places["tokens"] = (ctx.artifact("tokens"), _BESIDE)
        program = "modelyard.stages.stream:pretrain" if options.stream else "modelyard.train.programs:pretrain"
        assignment = Assignment(program, job, places)
        outcome = run_workers(ctx, assignment, steps, estimate)
        unigram = float(facts["unigram_entropy"])
        write_results(ctx, outcome, _page(ctx, outcome, unigram), estimate)
        return _result(outcome, unigram)


_BESIDE = ("tokenizer", "heldout")
"""What of a token artifact workers copy all the same when its training sequences are streamed."""


def _check_stream(options: PretrainOptions) -> None:
    if not options.stream:
        return
    if options.mixture is not None or len(set(options.inputs) - {"model"}) > 1:
        raise RecipeError(
            "a stream reads one token artifact in its own order",
            place="stream",
            mend="leave stream out for a mixture or several token inputs",
        )


def _extends(ctx: PlanContext[PretrainOptions]) -> bool:
    """Whether the tokens' tokenizer is that of the model to continue with more tokens: rows are then added."""
    tokens, model = ctx.inputs.get("tokens"), ctx.inputs.get("model")
    if ctx.options.model is not None or model is None or not isinstance(tokens, Artifact):
        return False
    place = model_place(model, "model")
    folder = place if isinstance(place, str) else place[0].join(place[1])
    return folder_extends(tokens.join("tokenizer"), folder)


def _token_inputs(ctx: PlanContext[PretrainOptions] | StageContext[PretrainOptions]) -> dict[str, Artifact]:
    """The token artifacts that are there, by input; `tokens` first."""
    found = {name: value for name, value in sorted(ctx.inputs.items()) if isinstance(value, Artifact)}
    return {name: found[name] for name in sorted(found, key="tokens".__ne__) if found[name].manifest.kind == "tokenize"}


def job_places(ctx: PlanContext[PretrainOptions] | StageContext[PretrainOptions]) -> dict[str, Any]:
    """What a `PretrainJob` reads, by field: a place, or places by name. All inputs must be there."""
    tokens = {name: (value, "") for name, value in _token_inputs(ctx).items()}
    places: dict[str, Any] = {"tokens": tokens.pop("tokens")}
    if tokens:
        places["more"] = tokens
    if "model" in ctx.inputs:
        places["start"] = model_place(ctx.inputs["model"], "model")
    return places


def _check_alike(inputs: Mapping[str, Artifact]) -> None:
    if len(inputs) < 2:
        return
    from modelyard.train.token_folders import check_shapes

    facts = {name: token_facts(tokens) for name, tokens in inputs.items()}
    check_shapes(facts, {name: tokens.uri for name, tokens in inputs.items()})


def _joined_facts(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """The description of all tokens together; the unigram entropy is the mean over their held-out tokens."""
    parts = [token_facts(tokens) for tokens in inputs.values()]
    if len(parts) == 1:
        return parts[0]
    weights = [max(1, int(part.get("heldout_tokens", 1))) for part in parts]
    entropy = sum(w * float(p["unigram_entropy"]) for w, p in zip(weights, parts, strict=True)) / sum(weights)
    return parts[0] | {"train_sequences": sum(int(p["train_sequences"]) for p in parts), "unigram_entropy": entropy}


def token_facts(tokens: Artifact) -> dict[str, Any]:
    """The token artifact's own description."""
    facts: dict[str, Any] = json.loads(read_bytes(tokens.join("tokens.json")))
    return facts


def known_shape(ctx: PlanContext[Any]) -> tuple[Config | None, int | None, int | None]:
    """The model's configuration, the sequence length and the tokens of the budget, each None while unknown."""
    length = token_shape(ctx)[0]
    return _config(ctx), length, _tokens(ctx, length)


def _prediction(ctx: StageContext[PretrainOptions], steps: int, facts: Mapping[str, Any]) -> Estimate | None:
    """What the planner says of this run, now that its tokens are there."""
    length = int(facts["sequence_length"])
    options = ctx.options
    if options.model is not None:
        config: Config | None = planned_config(options.model, int(facts["vocab_size"]))
    else:
        config = model_config(ctx.inputs.get("model"), "model")
    return predicted(options, config, steps * options.global_batch * length, length, root=ctx.root)


def _config(ctx: PlanContext[PretrainOptions]) -> Config | None:
    """The model's configuration, if it can be known yet."""
    if ctx.options.model is None:
        return known_model(ctx)
    return planned_config(ctx.options.model, token_shape(ctx)[1] or 1)


def token_shape(ctx: PlanContext[Any]) -> tuple[int | None, int | None]:
    """Sequence length and vocabulary of the tokens, from the artifact or from the options that will make it."""
    tokens = ctx.inputs.get("tokens")
    if isinstance(tokens, Artifact):
        facts = token_facts(tokens)
        return int(facts["sequence_length"]), int(facts["vocab_size"])
    before = ctx.upstream.get("tokens")
    train = getattr(getattr(before, "tokenizer", None), "train", None)
    return getattr(before, "sequence_length", None), getattr(train, "vocab_size", None)


def _tokens(ctx: PlanContext[PretrainOptions], length: int | None) -> int | None:
    """Tokens the budget comes to, if it can be known yet."""
    options, given = ctx.options, _token_inputs(ctx)
    if length is None:
        return options.tokens
    if given and len(given) == len(set(ctx.options.inputs) - {"model"}):
        sequences = int(_joined_facts(given)["train_sequences"])
        return options.total_steps(sequences, length) * options.global_batch * length
    if options.steps is None and options.tokens is None:
        return None
    return options.total_steps(1, length) * options.global_batch * length


def _result(outcome: Outcome, unigram: float) -> StageResult:
    heldout = outcome.heldout_loss
    metrics = {
        "loss": outcome.loss,
        "unigram_entropy": unigram,
        **speed_metrics(outcome),
    }
    if heldout is not None:
        metrics["heldout_loss"] = heldout
    shown = "no held-out data" if heldout is None else f"held-out loss {heldout:.3f} (unigram {unigram:.3f} nats)"
    return StageResult(
        summary=f"{outcome.parameters / 1e6:.1f} M parameters, {outcome.tokens / 1e6:.2f} M tokens, {shown}, "
        f"{outcome.tokens_per_second:,.0f} tokens/s",
        counts={"parameters": outcome.parameters, "tokens": outcome.tokens, "steps": outcome.steps},
        metrics=metrics,
    )


def _page(ctx: StageContext[PretrainOptions], outcome: Outcome, unigram: float) -> Page:
    from modelyard.train.report import Page

    heldout = outcome.heldout_loss
    facts = [
        ("parameters", f"{outcome.parameters:,}"),
        ("tokens", f"{outcome.tokens:,} in {outcome.steps:,} steps"),
        ("held-out loss", "none" if heldout is None else f"{heldout:.4f} nats a token"),
        ("unigram entropy of the held-out text", f"{unigram:.4f} nats a token"),
        ("last training loss", f"{outcome.loss:.4f}"),
        ("throughput", f"{outcome.tokens_per_second:,.0f} tokens a second on {ctx.options.resources.workers} workers"),
        ("time", f"{outcome.seconds:.0f} s"),
        ("skipped updates", str(outcome.skipped)),
        *([("ended early", outcome.stopped)] if outcome.stopped else []),
    ]
    notes = [
        "A model that knew only how often each token occurs would have the unigram entropy as its loss.",
    ]
    return Page(f"Pre-training: {ctx.name}", facts, curves(outcome.history, ("unigram entropy", unigram)), notes)
