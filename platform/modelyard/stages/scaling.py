"""Stage `scaling`: trains a ladder of sizes and budgets, fits a scaling law, and predicts the next size.

The law is Hoffmann et al.'s L = E + A / N^alpha + B / D^beta (arXiv 2203.15556, approach 3) on held-out losses; N
leaves the embedding tables out, which at small sizes are most of a model and do little of its work.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from modelyard.errors import DataError, RecipeError
from modelyard.models.options import ModelOptions
from modelyard.planner import formatting as fmt
from modelyard.planner.estimate import Estimate
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.pretrain import token_facts, token_shape
from modelyard.stages.training import TrainingStageOptions, check_training, clear, planned_config, predict
from modelyard.storage import join, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.planner.fitting import Fit
    from modelyard.planner.scaling import Run
    from modelyard.train.report import Page

_RUNS = 6
"""What five coefficients need at least."""
_NEXT = "next"


class ScalingOptions(TrainingStageOptions):
    """The options of `pretrain` for every run, but for size and budget, which the ladder gives."""

    kind: Literal["scaling"] = Field(description="stage kind")
    sizes: dict[str, ModelOptions] = Field(description="name -> model to build, from small to large; two or more")
    tokens_per_parameter: tuple[float, ...] = Field(
        (5.0, 20.0),
        description="budgets of every size, tokens a parameter without embeddings (Hoffmann et al.: 20 is optimal)",
    )
    width_exponent: float = Field(
        0.5, ge=0, description="learning_rate is that of the first size; it falls with the width to this power"
    )
    predict: ModelOptions | None = Field(
        None, description="the next size, whose loss is predicted; null = twice the last"
    )
    verify: bool = Field(False, description="train the next size too, and report predicted against measured")
    bootstrap: int = Field(100, ge=0, description="resamples of the runs for the intervals")
    worth: float = Field(0.01, gt=0, description="nats a doubling of the budget must buy to be called worth it")

    @field_validator("tokens_per_parameter")
    @classmethod
    def _two_budgets(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < 2 or min(value) <= 0:
            raise ValueError("give two or more budgets, all above zero")
        return value


class ScalingStage(Stage[ScalingOptions]):
    """See the module."""

    kind = "scaling"
    version = 3
    Options = ScalingOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {"tokens": InputSpec(kinds=("tokenize",))}

    def check(self, ctx: PlanContext[ScalingOptions]) -> None:
        """Raises the errors of `check_training` for every size, and RecipeError for a ladder that cannot be fitted."""
        options = ctx.options
        if len(options.sizes) * len(options.tokens_per_parameter) < _RUNS or len(options.sizes) < 2:
            raise RecipeError(
                f"{len(options.sizes)} sizes x {len(options.tokens_per_parameter)} budgets are too few runs",
                place="sizes",
                mend=f"give {_RUNS} runs or more: three sizes and two budgets, for one",
            )
        if _NEXT in options.sizes:
            raise RecipeError(f"a size is named {_NEXT}", place=f"sizes.{_NEXT}", mend="give it another name")
        if options.verify and options.predict is None:
            raise RecipeError("there is no next size to verify", place="predict", mend="give the model to predict")
        length, vocabulary = token_shape(ctx)
        for size in options.sizes.values():
            check_training(options, planned_config(size, vocabulary or 1), length, vocabulary)

    def estimate(self, ctx: PlanContext[ScalingOptions]) -> Estimate:
        """The sum over all runs, each by the planner."""
        options, (length, vocabulary) = ctx.options, token_shape(ctx)
        if length is None or vocabulary is None:
            return Estimate(notes=("size and time are known once its inputs are",))
        parts = [
            predict(options, planned_config(size, vocabulary), budget * _parameters(size, vocabulary), length)
            for size in options.sizes.values()
            for budget in options.tokens_per_parameter
        ]
        return Estimate(
            parameters=max(part.parameters or 0 for part in parts),
            tokens=sum(part.tokens or 0 for part in parts),
            flops=sum(part.flops or 0.0 for part in parts),
            memory_bytes=max(part.memory_bytes or 0 for part in parts),
            seconds=sum(part.seconds or 0.0 for part in parts),
            cost_usd=_sum([part.cost_usd for part in parts]),
            energy_kwh=_sum([part.energy_kwh for part in parts]),
            notes=(f"{len(parts)} runs", *parts[-1].notes),
        )

    def run(self, ctx: StageContext[ScalingOptions]) -> StageResult:
        """Trains the ladder on Ray Train workers, fits, predicts and writes `runs.json`, `fit.json` and the report.

        Raises:
            DataError: there is no held-out data, or the losses cannot be fitted.
        """
        from modelyard.stages.workers import Assignment, run_workers
        from modelyard.train.ladder import LadderJob

        tokens = ctx.artifact("tokens")
        facts = token_facts(tokens)
        if not int(facts.get("heldout_sequences", 1)):
            raise DataError("there is no held-out text", place=tokens.uri, mend="tokenize with heldout above 0")
        runs = _jobs(ctx, facts)
        clear(ctx, "runs.json", "fit.json", "report.html", "report.md", "loss.csv")
        job = LadderJob(tokens="", runs=runs, results=join(ctx.work, "results"))
        steps = sum(run.train.steps or 0 for run in runs.values())
        run_workers(ctx, Assignment("modelyard.train.ladder:ladder", job, {"tokens": (tokens, "")}), steps)
        return _conclude(ctx, list(runs), facts)


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _parameters(model: ModelOptions, vocabulary: int) -> int:
    """N of the law: without embeddings."""
    from modelyard.planner.parameters import count

    return count(planned_config(model, vocabulary)).non_embedding


def _jobs(ctx: StageContext[ScalingOptions], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Every run of the ladder by name; the next size with the largest budget last, where it is to be verified."""
    options = ctx.options
    planned = [(name, size, budget) for name, size in options.sizes.items() for budget in options.tokens_per_parameter]
    if options.verify and options.predict is not None:
        planned.append((_NEXT, options.predict, max(options.tokens_per_parameter)))
    first = _width(next(iter(options.sizes.values())), int(facts["vocab_size"]))
    return {f"{name}-{budget:g}": _job(ctx, facts, size, budget, first) for name, size, budget in planned}


def _width(model: ModelOptions, vocabulary: int) -> float:
    from modelyard.planner.architecture import parse

    return float(parse(planned_config(model, vocabulary)).layers[0].hidden)


def _job(
    ctx: StageContext[ScalingOptions], facts: Mapping[str, Any], size: ModelOptions, budget: float, first: float
) -> Any:
    from modelyard.train.programs import PretrainJob

    options, vocabulary = ctx.options, int(facts["vocab_size"])
    tokens = budget * _parameters(size, vocabulary)
    steps = max(1, round(tokens / (options.global_batch * int(facts["sequence_length"]))))
    rate = options.learning_rate * (first / _width(size, vocabulary)) ** options.width_exponent
    update = {"steps": steps, "tokens": None, "epochs": None, "learning_rate": rate}
    name = f"{_parameters(size, vocabulary)}-{budget:g}"
    return PretrainJob(
        tokens="",
        output=join(ctx.work, "models", name),
        train=options.training().model_copy(update=update),
        model=size,
        checkpoints=join(ctx.work, "checkpoints", name),
    )


def _conclude(ctx: StageContext[ScalingOptions], names: list[str], facts: Mapping[str, Any]) -> StageResult:
    """Fits the finished runs and writes what they say."""
    from modelyard.planner.fitting import fit
    from modelyard.planner.scaling import Run

    options, vocabulary = ctx.options, int(facts["vocab_size"])
    sizes = dict(options.sizes) | ({_NEXT: options.predict} if options.predict is not None else {})
    rows = []
    for name in names:
        found = json.loads(read_bytes(join(ctx.work, "results", name, "result.json")))
        non_embedding = _parameters(sizes[name.rsplit("-", 1)[0]], vocabulary)
        rows.append({"name": name, "non_embedding": non_embedding, **found})
    runs = {row["name"]: Run(row["non_embedding"], row["tokens"], row["heldout_loss"]) for row in rows}
    fitted = fit([run for name, run in runs.items() if not _is_next(name)], bootstrap=options.bootstrap)
    forecast = _forecast(ctx, fitted, runs, vocabulary)
    write_bytes(join(ctx.output, "runs.json"), json.dumps(rows, indent=1).encode())
    document = {"law": asdict(fitted.law), "intervals": fitted.rows(), "huber": fitted.objective, "next": forecast}
    write_bytes(join(ctx.output, "fit.json"), json.dumps(document, indent=1).encode())
    page = _page(ctx, fitted, runs, forecast)
    for name, text in (("report.html", page.html()), ("report.md", page.markdown())):
        write_bytes(join(ctx.output, name), text.encode())
        ctx.run.log_text(name, text)
    for doubt in _doubts(fitted):
        ctx.progress.say(f"[yellow]warning[/]: {doubt}")
    law = fitted.law
    summary = f"{len(runs)} runs, L = {law.E:.2f} + {law.A:.3g} / N^{law.alpha:.2f} + {law.B:.3g} / D^{law.beta:.2f}; "
    metrics = {"predicted_loss": forecast["loss"], "alpha": law.alpha, "beta": law.beta, "E": law.E}
    if "measured" in forecast:
        metrics["measured_loss"] = forecast["measured"]
    return StageResult(
        summary + f"next size ({fmt.number(forecast['parameters'])}): loss {forecast['loss']:.3f}",
        counts={"runs": len(runs)},
        metrics=metrics,
    )


def _is_next(name: str) -> bool:
    return name.rsplit("-", 1)[0] == _NEXT


def _forecast(
    ctx: StageContext[ScalingOptions], fitted: Fit, runs: Mapping[str, Run], vocabulary: int
) -> dict[str, float]:
    """The loss of the next size at the largest budget a parameter, with an interval and, if trained, what came."""
    options = ctx.options
    largest = max(run.parameters for run in runs.values())
    size = float(_parameters(options.predict, vocabulary)) if options.predict is not None else 2 * largest
    tokens = size * max(options.tokens_per_parameter)
    loss, low, high = fitted.predict(size, tokens)
    found = {"parameters": size, "tokens": tokens, "loss": loss, "low": low, "high": high}
    measured = [run.loss for name, run in runs.items() if _is_next(name)]
    return found | ({"measured": measured[0], "error": loss / measured[0] - 1} if measured else {})


def _page(
    ctx: StageContext[ScalingOptions], fitted: Fit, runs: Mapping[str, Run], forecast: Mapping[str, float]
) -> Page:
    from modelyard.planner.scaling import more_tokens
    from modelyard.train.report import Page, Table

    law = fitted.law
    gain = more_tokens(law, forecast["parameters"], forecast["tokens"])
    worth = "worth it" if gain >= ctx.options.worth else f"less than the {ctx.options.worth:g} it should"
    facts = [
        ("law", f"L = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}"),
        ("next size", f"{forecast['parameters']:,.0f} parameters without embeddings, {forecast['tokens']:,.0f} tokens"),
        ("predicted loss", f"{forecast['loss']:.4f} nats (80 %: {forecast['low']:.4f} to {forecast['high']:.4f})"),
        ("compute-optimal at that budget", _optimal(fitted, forecast)),
        ("twice the tokens would buy", f"{gain:.3g} nats: {worth}"),
    ]
    if "measured" in forecast:
        inside = forecast["low"] <= forecast["measured"] <= forecast["high"]
        verdict = f"prediction off by {forecast['error']:+.1%}, {'within' if inside else 'outside'} its interval"
        facts.append(("measured loss", f"{forecast['measured']:.4f} nats, {verdict}"))
    rows = [
        (name, f"{run.parameters:,.0f}", f"{run.tokens:,.0f}", f"{run.flops:.3g}", f"{run.loss:.4f}",
         f"{law.loss(run.parameters, run.tokens):.4f}")
        for name, run in runs.items()
    ]  # fmt: skip
    coefficients = [(name, *(f"{value:.4g}" for value in values)) for name, *values in fitted.rows()]
    tables = (
        Table("Runs", ("run", "parameters", "tokens", "FLOPs", "held-out loss", "law"), rows),
        Table("Coefficients", ("", "value", "10 %", "90 %"), coefficients),
    )
    notes = (
        "Parameters are counted without embedding tables. Intervals come from resampling the runs.",
        *_doubts(fitted),
    )
    return Page(f"Scaling law: {ctx.name}", facts, _plots(fitted, runs, forecast), notes, tables)


def _optimal(fitted: Fit, forecast: Mapping[str, float]) -> str:
    if fitted.unseen:
        return "not to be told from these runs"
    parameters, tokens = fitted.law.optimal(6 * forecast["parameters"] * forecast["tokens"])
    return f"{parameters:,.0f} parameters, {tokens:,.0f} tokens"


def _doubts(fitted: Fit) -> tuple[str, ...]:
    """What a reader must know before believing the law."""
    if not fitted.unseen:
        return ()
    what = " and ".join(fitted.unseen)
    return (f"These runs do not show that more {what} lower the loss: take sizes and budgets further apart.",)


_COLORS = ("#2463b8", "#15803d", "#7c3aed", "#b45309", "#be123c", "#0e7490")


def _plots(fitted: Fit, runs: Mapping[str, Run], forecast: Mapping[str, float]) -> Any:
    """Measured losses by size over the logarithm of tokens, with the law's curves drawn through to the next size."""
    from modelyard.train.report import Line

    sizes = sorted({run.parameters for run in runs.values()} | {forecast["parameters"]})
    ends = [math.log10(run.tokens) for run in runs.values()] + [math.log10(forecast["tokens"])]
    low, high = min(ends), max(ends)
    grid = [low + (high - low) * i / 40 for i in range(41)]
    lines = []
    for i, size in enumerate(sizes):
        color = _COLORS[i % len(_COLORS)]
        points = sorted((math.log10(run.tokens), run.loss) for run in runs.values() if run.parameters == size)
        curve = [(x, fitted.law.loss(size, 10**x)) for x in grid]
        lines.append(Line(f"{fmt.number(size)}, law", curve, color, dashed=True))
        if points:
            lines.append(Line(f"{fmt.number(size)}, measured", points, color))
    return (("Held-out loss, nats a token, by the decimal logarithm of tokens", lines),)
