"""What the commands print: tables and the lines that say what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelyard.planner import formatting as fmt
from modelyard.recipe import Recipe
from modelyard.stages.api import StagePlan
from modelyard.stages.runner import Outcome
from modelyard.storage import ArtifactStore, is_remote
from modelyard.tracking import RecipeRun

if TYPE_CHECKING:
    from modelyard.planner.choose import Choice
    from modelyard.planner.fitting import Fit
    from modelyard.planner.inference import Deployment
    from modelyard.planner.modes import Comparison
    from modelyard.planner.search import Search
    from modelyard.stages.calibration import Fitted


def duration(seconds: float | None) -> str:
    """A time for people: 42 s, 5 min 10 s, 2 h 05 min."""
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def short(uri: str) -> str:
    """A path relative to here where that is shorter."""
    if is_remote(uri):
        return uri
    try:
        return str(Path(uri).relative_to(Path.cwd()))
    except ValueError:
        return uri


def _table(title: str, *columns: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold", no_wrap=name in right)
    return table


def plan_table(recipe: Recipe, plans: Sequence[StagePlan]) -> RenderableType:
    """The plan: what is done, what runs and why, and the predictions."""
    right = ("params", "FLOPs", "mem/worker", "time", "cost", "energy")
    table = _table(f"{recipe.name}  ->  {short(recipe.root)}", "stage", "kind", "", *right, right=right)
    # Names are what people look for: they are not broken, and what is empty need not say so.
    table.columns[0].no_wrap = table.columns[1].no_wrap = table.collapse_padding = True
    for item in plans:
        e = item.estimate
        state = Text("done", "green") if item.cached else Text("runs", "yellow")
        cells = (
            fmt.number(e.parameters), fmt.number(e.flops), fmt.size(e.memory_bytes),
            fmt.duration(None if item.cached else e.seconds), fmt.money(e.cost_usd), fmt.energy(e.energy_kwh),
        )  # fmt: skip
        table.add_row(item.name, item.kind, state, *("" if cell == "-" else cell for cell in cells))
    reasons = [Text.assemble((f"{p.name} runs: ", "bold"), _reason(p)) for p in plans if not p.cached]
    notes = [Text(f"{p.name}: {note}", "dim") for p in plans for note in p.estimate.notes]
    known = [p.estimate.seconds for p in plans if not p.cached and p.estimate.seconds]
    total = f"{sum(not p.cached for p in plans)} of {len(plans)} stages run; "
    total += f"predicted {fmt.duration(sum(known))}" if known else "time unknown"
    return Group(table, Text(), *reasons, *notes, Text(total))


def _reason(plan: StagePlan) -> str:
    rest = f"; and {len(plan.why) - 4} more" if len(plan.why) > 4 else ""
    return "; ".join(plan.why[:4]) + rest


def choice_table(choice: Choice) -> RenderableType:
    """What a budget buys."""
    table = _table("what the budget buys", "", "", right=())
    e = choice.estimate
    rows = [
        ("parameters", fmt.number(choice.parameters)), ("tokens", fmt.number(choice.tokens)),
        ("time", fmt.duration(choice.hours * 3600)), ("cost", fmt.money(choice.usd)),
        ("energy", fmt.energy(e.energy_kwh)), ("memory a worker", fmt.size(e.memory_bytes)),
        ("predicted loss", f"{choice.loss:.3f} nats a token"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    return Group(table, Text(), *[Text(note, "dim") for note in e.notes])


def choice_lines(choice: Choice, stage: str | None) -> str:
    """The lines of a recipe that ask for what a budget buys."""
    plain = {k: v for k, v in choice.config.items() if isinstance(v, str | int | float)}
    config = ", ".join(f"{k}: {str(v).lower() if isinstance(v, bool) else v}" for k, v in plain.items())
    return (
        f"\nin a recipe:\n  {stage or 'base'}:\n    model: {{config: {{{config}}}}}\n    tokens: {int(choice.tokens)}"
    )


def layouts_table(stage: str, found: Search, most: int = 8) -> RenderableType:
    """The best layouts, and why the others lose."""
    table = _table(
        f"{stage}: {found.tried} layouts tried", "layout", "step", "MFU", "bubble", "comm.", "memory", "why not",
        right=("step", "MFU", "bubble", "comm.", "memory"),
    )  # fmt: skip
    for c in found.candidates[:most]:
        table.add_row(
            c.layout.label(), fmt.duration(c.step.seconds), fmt.share(c.step.mfu), fmt.share(c.step.bubble_share),
            fmt.share(c.step.communication_share), fmt.size(c.memory.peak), c.reason or "the fastest",
        )  # fmt: skip
    ruled = [Text(f"{number} {reason}", "dim") for reason, number in found.rejected.items()]
    return Group(table, *ruled)


def calibration_table(fitted: Fitted) -> RenderableType:
    """What a calibration found, and each run's step as it was, as the table predicted it, and as it now would be."""
    hw = fitted.result.hardware
    table = _table(
        f"{fitted.cores:g} x {fitted.hardware}: efficiency {hw.efficiency:.3f}, bandwidth {hw.bandwidth / 1e9:.1f} GB/s"
        f" from {fitted.result.runs} runs",
        "run", "measured step", "before", "after", right=("measured step", "before", "after"),
    )  # fmt: skip
    for name, seconds, before, after in fitted.runs:
        table.add_row(name, fmt.duration(seconds), f"{before / seconds - 1:+.0%}", f"{after / seconds - 1:+.0%}")
    return table


def scaling_table(fit: Fit | None, runs: int, flops: float) -> RenderableType:
    """A law's coefficients, the compute-optimal model, and what the next doublings buy."""
    from modelyard.planner.scaling import Chinchilla, returns

    law = fit.law if fit is not None else Chinchilla()
    title = f"fitted to {fit.runs} runs" if fit else f"published coefficients ({runs} own runs, too few or too equal)"
    table = _table(f"L = E + A / N^alpha + B / D^beta, {title}", "", "value", "80 % interval", right=("value",))
    for name in ("E", "A", "B", "alpha", "beta"):
        low, high = fit.interval(name) if fit is not None else (float("nan"), float("nan"))
        shown = f"{low:.4g} to {high:.4g}" if low == low else ""
        table.add_row(name, f"{getattr(law, name):.4g}", shown)
    right = ("FLOPs", "parameters", "tokens", "loss", "next doubling buys")
    curve = _table("\ncompute-optimal", *right, right=right)
    for p in returns(law, [flops * 10**i for i in range(4)]):
        shown = f"{p.loss:.3f}"
        if fit is not None:
            _, low, high = fit.predict(p.parameters, p.tokens)
            shown += f" ({low:.3f} to {high:.3f})"
        curve.add_row(
            fmt.flop(p.flops), fmt.number(p.parameters), fmt.number(p.tokens), shown, f"{p.next_doubling:.3f}"
        )
    return Group(table, curve)


def capacity_table(title: str, found: Deployment, modes: Comparison) -> RenderableType:
    """Replicas for a load, and the four ways to infer with their break-even loads."""
    r = found.rates
    speeds = f"{r.prefill_tokens_per_second:,.0f} and {r.decode_tokens_per_second:,.0f} tokens/s"
    million = fmt.money(found.usd_per_million_tokens)
    table = _table(title, "", "", right=())
    rows = [
        ("replicas", f"{found.replicas} ({found.devices} devices), {found.note}"),
        ("prefill, decode a replica", speeds),
        ("first token, each next", f"{fmt.duration(r.time_to_first_token)}, {fmt.duration(r.time_per_token)}"),
        ("memory a device", fmt.size(r.memory.peak)),
        ("cost", f"{fmt.money(found.usd_per_hour)} an hour, {million} a million tokens"),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    right = ("a day", "a million tokens")
    ways = _table("\na working day with this load at its busiest", "way", *right, "answer comes", right=right)
    for m in modes.modes:
        ways.add_row(m.name, fmt.money(m.usd_per_day), fmt.money(m.usd_per_million_tokens), m.latency)
    points = [
        Text(f"{pair}: " + (f"break even at {fmt.number(load)} requests a day" if load else "never break even"), "dim")
        for pair, load in modes.break_even.items()
    ]
    return Group(table, ways, Text(), *points)


def summary_table(outcome: Outcome) -> RenderableType:
    """What an execution gave: stage, time, what came out, where it lies."""
    table = _table(
        f"{outcome.recipe.name}: {duration(outcome.seconds)}",
        "stage",
        "time",
        "what came out",
        "where",
        right=("time",),
    )
    for name in outcome.recipe.stages:
        artifact = outcome.artifacts[name]
        time = duration(artifact.manifest.seconds) if name in outcome.ran else "done before"
        table.add_row(name, time, artifact.manifest.summary, short(artifact.uri))
    return table


def next_steps(outcome: Outcome, recipe_path: Path) -> RenderableType:
    """Commands a person would run next."""
    root = shlex.quote(short(outcome.recipe.root))
    lines = [f"modelyard report {recipe_path} --open", f"modelyard ui {root}"]
    registered = [a for a in outcome.artifacts.values() if a.manifest.kind == "register"]
    if registered:
        extra = registered[-1].manifest.extra
        name = extra.get("name", outcome.recipe.name)
        lines.append(f"modelyard serve models:/{name}@{extra.get('alias', 'champion')} --root {root}")
        body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "def read(path): ..."}}]}}'
        lines.append(f"curl localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{body}'")
    return Group(Text("\nnext:", "bold"), *[Text(f"  {line}", no_wrap=True, overflow="ignore") for line in lines])


def status_table(store: ArtifactStore, plans: Sequence[StagePlan]) -> RenderableType:
    """What of a recipe is published, and when."""
    table = _table(f"artifacts in {store.root}", "stage", "", "when", "took", "what came out", "where", right=("took",))
    for item in plans:
        artifact = store.find(item.name, item.fingerprint)
        if artifact is None:
            table.add_row(item.name, Text("to run", "yellow"), "", "", "; ".join(item.why), "")
            continue
        m = artifact.manifest
        when = m.ended.astimezone().strftime("%Y-%m-%d %H:%M")
        table.add_row(item.name, Text("done", "green"), when, duration(m.seconds), m.summary, short(artifact.uri))
    return table


def runs_table(runs: Sequence[RecipeRun]) -> RenderableType:
    """Latest executions as MLflow knows them."""
    table = _table("\nlatest runs in MLflow", "started", "status", "took", "stages", "run", right=("took",))
    for run in runs:
        stages = ", ".join(f"{s.name} {s.status.lower()}" for s in run.stages)
        started = run.started.astimezone().strftime("%Y-%m-%d %H:%M")
        took = duration((run.ended - run.started).total_seconds()) if run.ended else ""
        table.add_row(started, run.status, took, stages, run.id)
    return table
