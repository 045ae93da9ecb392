"""What a training stage leaves for people: the loss table, and a report as HTML and Markdown, also in its run."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.planner.measured import compare
from modelyard.stages.base import StageContext
from modelyard.storage import exists, filesystem, is_remote, join, list_files, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.planner.estimate import Estimate
    from modelyard.train.loop import Outcome
    from modelyard.train.report import Page, Table

RESULTS = ("loss.csv", "report.html", "report.md", "samples", "profile", "hangs")
"""What a training stage writes beside its models."""
_LOGGED = ("profile", "hangs")


def write_results(ctx: StageContext[Any], outcome: Outcome, page: Page, estimate: Estimate | None) -> None:
    """`loss.csv`, `report.html` and `report.md` in the stage's output; reports, profiles and stacks in its run too."""
    from modelyard.train.checkpoint import write_history

    with tempfile.TemporaryDirectory() as folder:
        write_history(Path(folder) / "loss.csv", outcome.history)
        write_bytes(join(ctx.output, "loss.csv"), (Path(folder) / "loss.csv").read_bytes())
    found = (*_by_source(outcome), *_predictions(outcome, estimate), *_phases(outcome), *_samples(ctx.output))
    page = replace(page, tables=(*page.tables, *found))
    for name, text in (("report.html", page.html()), ("report.md", page.markdown())):
        write_bytes(join(ctx.output, name), text.encode())
        ctx.run.log_text(name, text)
    ctx.run.log_metrics({f"heldout_loss/{name}": loss for name, loss in outcome.by_source.items()})
    for folder in _LOGGED:
        for name, _ in _files(join(ctx.output, folder)):
            _log_file(ctx, f"{folder}/{name}")


def _files(uri: str) -> Sequence[tuple[str, int]]:
    return list(list_files(uri)) if exists(uri) else []


def _log_file(ctx: StageContext[Any], name: str) -> None:
    """Text goes into the run; other files by their path, and from a bucket not at all: the artifact has them."""
    uri = join(ctx.output, name)
    if name.endswith((".txt", ".csv")):
        ctx.run.log_text(name, read_bytes(uri).decode("utf-8"))
    elif not is_remote(uri):
        ctx.run.log_file(filesystem(uri)[1], name)


def _by_source(outcome: Outcome) -> Sequence[Table]:
    from modelyard.train.report import Table

    whole = outcome.heldout_loss
    if not outcome.by_source or whole is None:
        return ()
    ordered = sorted(outcome.by_source.items(), key=lambda item: -item[1])
    rows = [(name, f"{loss:.4f}", f"{loss - whole:+.4f}") for name, loss in [*ordered, ("all", whole)]]
    return (Table("Held-out loss by source, nats a token", ("source", "loss", "above all"), rows),)


def _predictions(outcome: Outcome, estimate: Estimate | None) -> Sequence[Table]:
    from modelyard.train.report import Table

    if estimate is None:
        return ()
    measured = compare(
        estimate,
        seconds=sum(row["seconds"] for row in outcome.history),
        memory_bytes=outcome.peak_bytes,
        tokens_per_second=outcome.tokens_per_second,
    )
    rows = [difference.row() for difference in measured]
    return (Table("Predicted against measured", ("", "predicted", "measured", "difference"), rows),) if rows else ()


def _phases(outcome: Outcome) -> Sequence[Table]:
    from modelyard.train.report import Table

    total = sum(outcome.phases.values())
    if not total:
        return ()
    rows = [(n.removesuffix("_seconds"), f"{s:.4f} s", f"{s / total:.1%}") for n, s in outcome.phases.items()]
    return (Table("Where the time of a step goes", ("phase", "mean of a step", "share"), rows),)


def _samples(output: str) -> Sequence[Table]:
    from modelyard.train.report import Table

    rows = []
    for name, _ in sorted(_files(join(output, "samples"))):
        step = f"{int(Path(name).stem.split('-')[1]):,}"
        for row in json.loads(read_bytes(join(output, "samples", name))):
            rows.append((step, row["prompt"], row["text"]))
    return (Table("What the model writes", ("step", "prompt", "text"), rows),) if rows else ()


def curves(history: Sequence[Mapping[str, float]], floor: tuple[str, float] | None = None) -> Sequence[Any]:
    """Plots of loss (with held-out points and a level to fall under), throughput, rate and gradient norm."""
    from modelyard.train.report import Line

    def points(name: str) -> list[tuple[float, float]]:
        return [(row["step"], row[name]) for row in history if name in row]

    loss = [Line("training loss", points("loss"))]
    if points("heldout_loss"):
        loss.append(Line("held-out loss", points("heldout_loss"), "#c2410c"))
    if floor is not None and history:
        ends = [(history[0]["step"], floor[1]), (history[-1]["step"], floor[1])]
        loss.append(Line(floor[0], ends, "#5a6472", dashed=True))
    return (
        ("Loss, nats a token, by step", loss),
        ("Tokens a second, by step", [Line("tokens a second", points("tokens_per_second"), "#15803d")]),
        ("Learning rate, by step", [Line("learning rate", points("learning_rate"), "#7c3aed")]),
        ("Gradient norm before clipping, by step", [Line("gradient norm", points("grad_norm"), "#b45309")]),
        *_experts(points),
    )


def _experts(points: Callable[[str], list[tuple[float, float]]]) -> Sequence[Any]:
    """Plots of how a mixture's experts are used; none for other models."""
    from modelyard.train.report import Line

    if not points("expert_use"):
        return ()
    balance = Line("balance loss (1 = even)", points("balance_loss"))
    peak = Line("busiest expert over an even share", points("expert_peak"), "#c2410c")
    use = Line("share of experts effectively used", points("expert_use"), "#15803d")
    dead = Line("experts without a token", points("dead_experts"), "#be123c")
    return (("Balance of experts, by step", [balance, peak]), ("Use of experts, by step", [use]),
            ("Dead experts of all layers, by step", [dead]))  # fmt: skip
