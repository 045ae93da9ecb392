"""Stage `refusals`: how often models refuse what is unsafe, as they should, and what is safe, as they should not.

It reads answers that `generate` stages gave to probes with a label; several of them stand side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from modelyard.align.refusals import LABELS, Rate, rates, refuses
from modelyard.errors import DataError
from modelyard.recipe.schema import StageOptions
from modelyard.stages.base import InputSpec, Stage, StageContext, StageResult
from modelyard.stages.examples import read_records
from modelyard.storage import join, write_bytes

_SHOWN = 4


class RefusalOptions(StageOptions):
    """Refusal and over-refusal of answered probes."""

    kind: Literal["refusals"] = Field(description="stage kind")
    label: str = Field("label", min_length=1, description="field that says `safe` or `unsafe` of the prompt")
    prompt: str = Field("prompt", min_length=1, description="field of the prompt, for the report")


class RefusalStage(Stage[RefusalOptions]):
    """See the module."""

    kind = "refusals"
    Options = RefusalOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {}
    more = InputSpec(kinds=("generate",))
    """Answered probes, by the names they have in the report."""

    def run(self, ctx: StageContext[RefusalOptions]) -> StageResult:
        """Counts refusals of every input and writes refusals.json and report.html."""
        from modelyard.train.report import Page, Table

        found = {name: _answers(ctx, name) for name in ctx.inputs}
        measured = {name: rates((unsafe, text) for _, unsafe, text in rows) for name, rows in found.items()}
        record = {
            name: {"refusal": _plain(bad), "over_refusal": _plain(good)} for name, (bad, good) in measured.items()
        }
        write_bytes(join(ctx.output, "refusals.json"), (json.dumps(record, indent=1) + "\n").encode())
        rows = [(name, _said(bad), _said(good)) for name, (bad, good) in measured.items()]
        facts = [(f"probes of {name}", f"{len(answers):,}") for name, answers in found.items()]
        tables = (
            Table("Refusals, with bounds at 95 %", ("", "of what is unsafe", "of what is safe (over-refusal)"), rows),
            Table("Answers that are not as they should be", ("", "prompt", "answer"), list(_wrong(found))),
        )
        html = Page(f"Refusals: {ctx.name}", facts, [], tables=tables).html()
        write_bytes(join(ctx.output, "report.html"), html.encode())
        ctx.run.log_text("report.html", html)
        return _result(measured)


def _answers(ctx: StageContext[RefusalOptions], name: str) -> list[tuple[str, bool, str]]:
    """Prompt, whether it is unsafe, answer.

    Raises:
        DataError: a probe has another label, or none.
    """
    artifact, options = ctx.artifact(name), ctx.options
    field = str(artifact.manifest.options.get("output", "generated"))
    found = []
    for row, place in read_records(artifact):
        label = str(row.get(options.label)).strip().lower()
        if label not in LABELS:
            mend = f"write {' or '.join(LABELS)} as {options.label}"
            raise DataError(f"the label is {label!r}", place=place, mend=mend)
        if row.get(field) is not None:  # else the row ended with an error, which `generate` has counted
            found.append((str(row.get(options.prompt, "")), LABELS[label], str(row[field])))
    if not found:
        raise DataError("there are no answers", place=artifact.uri, mend="give probes that the model can answer")
    return found


def _plain(rate: Rate) -> dict[str, Any]:
    return {"share": rate.share, "hits": rate.hits, "count": rate.count, "interval": rate.interval}


def _said(rate: Rate) -> str:
    low, high = rate.interval
    return f"{rate.share:.1%} ({low:.1%} to {high:.1%}) of {rate.count:,}" if rate.count else "not asked"


def _wrong(found: Mapping[str, list[tuple[str, bool, str]]]) -> Iterator[tuple[str, str, str]]:
    for name, rows in found.items():
        wrong = [row for row in rows if refuses(row[2]) is not row[1]]
        yield from ((name, prompt, text[:300]) for prompt, _, text in wrong[:_SHOWN])


def _result(measured: Mapping[str, tuple[Rate, Rate]]) -> StageResult:
    metrics, counts = {}, {}
    for name, (bad, good) in measured.items():
        for kind, rate in (("refusal_rate", bad), ("over_refusal_rate", good)):
            counts[f"{name}_{kind.removesuffix('_rate')}_probes"] = rate.count
            if rate.count:
                metrics[f"{name}_{kind}"] = rate.share
    said = [f"{name} {bad.share:.0%} of unsafe, {good.share:.0%} of safe" for name, (bad, good) in measured.items()]
    return StageResult(f"refused: {'; '.join(said)}", counts, metrics)
