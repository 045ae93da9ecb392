"""The curate stage on Ray Data: segments of row-wise steps, a deduplication between them, then the report.

    files -> [segment 0: read, steps] -> dedup -> [segment 1: steps] -> ... -> data/, audit/

A segment is a set of units (see `corpus.read.units`); Ray Data runs them side by side, each writes its
own files and then a record that vouches for them. An interrupted run finds the records and does the rest.
Text itself never goes through a shuffle: deduplication moves keys, and texts of candidates.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from modelyard.corpus.dedup_options import DedupMethod
from modelyard.corpus.options import StepOptions
from modelyard.corpus.read.records import NOT_DAMAGE
from modelyard.corpus.read.units import Unit, units
from modelyard.corpus.tally import Tally
from modelyard.errors import DataError, StageError
from modelyard.recipe import decisive
from modelyard.stages import curate_ray
from modelyard.stages.base import StageContext, StageResult
from modelyard.stages.curate import CurateOptions, CurateStage, file_refs, named_files
from modelyard.storage import absolute, join, list_files, read_bytes, remove, write_bytes

Context = StageContext[CurateOptions]


_REMOVED_BY = {
    "exact": ("dedup_exact", "exact_duplicate"),
    "minhash": ("dedup", "near_duplicate"),
    "paragraphs": ("dedup_paragraphs", "repeated_paragraphs"),
    "semantic": ("dedup_semantic", "semantic_duplicate"),
}
"""Step and reason in the audit, by method."""


@dataclass(frozen=True)
class Funnel:
    """All segments' tallies in order: the way of the documents from the first step to the last."""

    tallies: list[Tally]

    @property
    def steps(self) -> list[Any]:
        """All steps in the order they ran."""
        return [step for tally in self.tallies for step in tally.steps]

    @property
    def documents_in(self) -> int:
        """Records read, readable or not."""
        return int(self.steps[0].documents_in)

    @property
    def documents(self) -> int:
        """Documents kept."""
        return int(self.steps[-1].documents)

    @property
    def audited(self) -> int:
        """Documents with a reason."""
        return sum(sum(step.reasons.values()) for step in self.steps)


def curate(ctx: Context) -> StageResult:
    """Runs all segments and publishes documents, audit, report, data card and funnel."""
    refs, artifact = file_refs(ctx.inputs["files"])
    refs = [type(r)(absolute(r.uri), r.bytes, r.digest) for r in refs]
    work = units(refs, ctx.options.read, frozenset(r.uri for r in refs) if artifact else frozenset())
    ctx.progress.say(f"{len(refs):,} files, {sum(r.bytes for r in refs) / 1e6:,.1f} MB in {len(work)} units")
    tallies, vouched = [], set()
    with curate_ray.quiet():
        for segment, after in _segments(ctx):
            tally, files = _run_segment(ctx, segment, work)
            tallies.append(tally)
            vouched |= files if not segment.keys else {f for f in files if f.startswith(absolute(ctx.output))}
            _check_readable(ctx, tallies[0])
            if after is not None:
                _deduplicate(ctx, segment, after, work)
        funnel = Funnel(tallies)
        _check(ctx, funnel)
        _finish(ctx, funnel, vouched, refs)
    return _result(funnel)


def _split_steps(steps: tuple[StepOptions, ...]) -> list[tuple[list[StepOptions], StepOptions | None]]:
    parts: list[tuple[list[StepOptions], StepOptions | None]] = []
    current: list[StepOptions] = []
    for step in steps:
        if step.name == "dedup":
            parts.append((current, step))
            current = []
        else:
            current.append(step)
    return [*parts, (current, None)]


def _segments(ctx: Context) -> Iterator[tuple[Any, DedupMethod | None]]:
    from modelyard.corpus.unit import Segment

    before: Segment | None = None
    named = {name: named_files(value) for name, value in ctx.inputs.items() if name != "files"}
    identity = f"{CurateStage.version}|{ctx.options.read.model_dump_json()}"
    for index, (steps, ending) in enumerate(_split_steps(ctx.options.steps)):
        identity += "|".join(
            step.model_dump_json(exclude_none=True) for step in [*steps, *([ending] if ending else [])]
        )
        folder = join(ctx.work, f"segment-{index}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}")
        dedup = ending.dedup if ending is not None else None
        segment = Segment(
            index=index, steps=tuple(steps), documents=join(folder, "documents") if dedup else join(ctx.output, "data"),
            audit=join(ctx.output, "audit"), read=ctx.options.read if before is None else None,
            source=before.documents if before else None, decisions=_decisions(before.keys) if before else None,
            removed_by=_REMOVED_BY[before.dedup.method] if before and before.dedup else ("", ""),
            spans=before is not None and before.dedup is not None and before.dedup.method == "paragraphs",
            partitions=_partitions(before.keys) if before else 1, dedup=dedup,
            keys=join(folder, "keys"), scrub=ctx.options.scrub, inputs=named,
        )  # fmt: skip
        yield segment, dedup
        before = segment


def _decisions(keys: str) -> str:
    return join(posixpath.dirname(keys), "decisions")


def _partitions(keys: str) -> int:
    record = json.loads(read_bytes(join(_decisions(keys), "done.json")))
    return int(record["partitions"])


def _run_segment(ctx: Context, segment: Any, work: list[Unit]) -> tuple[Tally, set[str]]:
    """Does the units that no record vouches for; returns the sum of all tallies and all vouched files."""
    from modelyard.corpus.unit import Done

    folder = join(posixpath.dirname(segment.keys), "done")
    found = _finished(folder, work)
    missing = [unit for unit in work if unit.index not in found]
    title = ", ".join(["read" if segment.read else "apply", *(s.name for s in segment.steps)])
    if found:
        ctx.progress.say(f"{title}: {len(found)} of {len(work)} units were done before")
    with ctx.progress.task(title, len(work), "units") as bar:
        bar.advance(len(found))
        for record in curate_ray.run_units(missing, segment, folder, ctx.options.resources):
            done = Done.parse(record)
            found[done.unit] = done
            bar.advance(1)
    total: Tally | None = None
    files: set[str] = set()
    for _, done in sorted(found.items()):
        tally = Tally.parse(done.tally)
        files |= set(done.files)
        if total is None:
            total = tally
        else:
            total.add(tally)
    assert total is not None, "there is at least one unit"
    return total, files


def _finished(folder: str, work: list[Unit]) -> dict[int, Any]:
    """Records of units whose files are all there with the sizes they had."""
    from modelyard.corpus.unit import Done

    def load(name: str) -> Done | None:
        try:
            return Done.parse(read_bytes(join(folder, name)))
        except (ValueError, KeyError, TypeError):
            return None

    keys = {unit.index: unit.key for unit in work}
    with ThreadPoolExecutor(8) as pool:
        records = list(pool.map(load, [name for name, _ in list_files(folder)]))
    records = [r for r in records if r is not None and keys.get(r.unit) == r.key]
    sizes: dict[str, int] = {}
    for place in {posixpath.dirname(uri) for r in records if r for uri in r.files}:
        sizes |= {join(place, name): size for name, size in list_files(place)}
    return {r.unit: r for r in records if r and all(sizes.get(uri) == size for uri, size in r.files.items())}


def _deduplicate(ctx: Context, segment: Any, options: DedupMethod, work: list[Unit]) -> None:
    """Makes the decisions that end a segment, unless a record says that they are there."""
    place = join(_decisions(segment.keys), "done.json")
    sizes = dict(list_files(_decisions(segment.keys)))
    if "done.json" in sizes:
        record = json.loads(read_bytes(place))
        if all(sizes.get(name) == size for name, size in record["files"].items()):
            return
    remove(_decisions(segment.keys))
    name, what = options.method, "paragraphs" if options.method == "paragraphs" else "documents"
    with ctx.progress.task(f"dedup {name}", None, what) as bar:
        record = curate_ray.deduplicate(segment, options, ctx.options.shuffle_above, ctx.options.resources)
        bar.advance(record["documents"])
    ctx.progress.say(f"dedup {name}: {record['removed']:,} of {record['documents']:,} {what} go ({record['how']})")
    write_bytes(place, json.dumps(record, sort_keys=True).encode())


def _check_readable(ctx: Context, first: Tally) -> None:
    damaged = {name: n for name, n in first.steps[0].reasons.items() if name not in NOT_DAMAGE}
    bad = sum(damaged.values())
    most = ctx.options.read.max_bad_records
    if most is not None and bad > most:
        reasons = ", ".join(f"{name} {n:,}" for name, n in sorted(damaged.items()))
        rows = [row for row in first.removed if row["step"] == "read" and row["reason"] in damaged]
        examples = "; ".join(f"{row['source']}: {row['reason']}" for row in rows)[:400]
        raise DataError(
            f"{bad:,} records cannot be read, {most:,} are allowed ({reasons})",
            place=examples,
            mend="mend or exclude the files, or raise read.max_bad_records",
        )


def _check(ctx: Context, funnel: Funnel) -> None:
    if funnel.documents_in != funnel.documents + funnel.audited:
        raise StageError(
            f"{funnel.documents_in:,} documents came in, {funnel.documents:,} are kept and {funnel.audited:,} audited",
            place=ctx.name,
            mend="this is a fault of modelyard: keep the work folder and report it",
        )
    if funnel.documents:
        return
    if not funnel.documents_in:
        raise DataError("no documents were found in the input", place=ctx.name, mend="check read.format and the paths")
    worst = max(funnel.steps, key=lambda step: sum(step.reasons.values()))
    reasons = ", ".join(f"{n:,} {name}" for name, n in sorted(worst.reasons.items(), key=lambda i: -i[1])[:4])
    raise DataError(
        f"no documents are left of {funnel.documents_in:,}; the step {worst.name!r} removed most: {reasons}",
        place=f"{ctx.name}.steps",
        mend="check read.text and read.format against the files"
        if worst.name == "read"
        else f"loosen {worst.name}, set single rules to null, or use mode: annotate to look first",
    )


def _finish(ctx: Context, funnel: Funnel, vouched: set[str], refs: list[Any]) -> None:
    """Removes leftovers of earlier tries, scans for leaks, writes the report and logs to MLflow."""
    from modelyard.corpus.report import REPORTS, write_report

    for folder in ("data", "audit"):
        for name, _ in list_files(join(ctx.output, folder)):
            if join(ctx.output, folder, name) not in vouched:
                remove(join(ctx.output, folder, name))
    scrub = ctx.options.scrub
    if scrub is not None and scrub.leak_check:
        data = sorted(f for f in vouched if posixpath.dirname(f) == join(ctx.output, "data"))
        _check_leaks(ctx, curate_ray.leaks(data, scrub, ctx.options.resources))
    write_report(
        ctx.output,
        ctx.name,
        funnel.tallies,
        # Not how it ran: the card is the same whatever the workers.
        ctx.options.model_dump(mode="json", exclude_none=True, include={"inputs", *decisive(ctx.options)}),
        refs,
        ctx.options.card,
    )
    for name in REPORTS:
        ctx.run.log_text(name, read_bytes(join(ctx.output, name)).decode())
    ctx.run.log_metrics(
        {
            f"{step.name}.{i}.kept_share": step.documents / max(step.documents_in, 1)
            for i, step in enumerate(funnel.steps)
        }
    )


def _check_leaks(ctx: Context, found: list[tuple[str, str]]) -> None:
    if not found:
        return
    types = sorted({kind for _, kind in found})
    raise StageError(
        f"{len(found):,} entities are left after the scrub: {', '.join(types)}",
        place=f"{ctx.name}: document {found[0][0]} ({found[0][1]})",
        mend="move scrub to the end of the steps, or set the type to null if it may stay",
    )


def _result(funnel: Funnel) -> StageResult:
    first, last = funnel.steps[0], funnel.steps[-1]
    counts = {
        "documents_in": funnel.documents_in, "documents": funnel.documents, "bytes_in": first.bytes_in,
        "bytes": last.bytes, "audited": funnel.audited,
    }  # fmt: skip
    metrics = {
        "kept_documents": funnel.documents / funnel.documents_in,
        "kept_bytes": last.bytes / max(first.bytes_in, 1),
    }
    summary = f"{funnel.documents:,} of {funnel.documents_in:,} documents, {last.bytes / 1e6:,.1f} MB"
    return StageResult(summary, counts, metrics, {"steps": [asdict(step) for step in funnel.steps]})
