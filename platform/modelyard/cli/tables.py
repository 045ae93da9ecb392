"""What the commands print: tables and the lines that say what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from modelyard.recipe import Recipe
from modelyard.stages.api import StagePlan
from modelyard.stages.runner import Outcome
from modelyard.storage import ArtifactStore, is_remote
from modelyard.tracking import RecipeRun

_UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def amount(value: float | None, unit: str = "") -> str:
    """A number for people: 4.2 M, 1.3 G; empty for None."""
    if value is None:
        return ""
    for size, letter in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.1f} {letter}{unit}"
    return f"{value:,.0f} {unit}".rstrip()


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
    right = ("params", "FLOPs", "mem/worker", "time", "cost", "kWh")
    table = _table(f"{recipe.name}  ->  {short(recipe.root)}", "stage", "kind", "", *right, right=right)
    for item in plans:
        e = item.estimate
        state = Text("done", "green") if item.cached else Text("runs", "yellow")
        table.add_row(
            item.name, item.kind, state, amount(e.parameters), amount(e.flops), amount(e.memory_bytes, "B"),
            "" if item.cached else duration(e.seconds), f"${e.cost_usd:.2f}" if e.cost_usd else "",
            f"{e.energy_kwh:.3f}" if e.energy_kwh else "",
        )  # fmt: skip
    reasons = [Text.assemble((f"{p.name} runs: ", "bold"), _reason(p)) for p in plans if not p.cached]
    notes = [Text(f"{p.name}: {note}", "dim") for p in plans for note in p.estimate.notes]
    known = [p.estimate.seconds for p in plans if not p.cached and p.estimate.seconds]
    total = f"{sum(not p.cached for p in plans)} of {len(plans)} stages run; "
    total += f"predicted {duration(sum(known))}" if known else "time unknown"
    return Group(table, Text(), *reasons, *notes, Text(total))


def _reason(plan: StagePlan) -> str:
    rest = f"; and {len(plan.why) - 4} more" if len(plan.why) > 4 else ""
    return "; ".join(plan.why[:4]) + rest


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
