"""One unit of work: read or take up a portion of documents, run row-wise steps, write what is kept and why not.

Everything a unit writes is named by its number and comes out the same wherever and whenever it runs;
its record (`Done`) is written last and vouches for the files by size.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus import dedup
from modelyard.corpus.audit import AUDIT_SCHEMA, EXCERPT, removed
from modelyard.corpus.dedup_options import DedupMethod, ParagraphOptions, SemanticOptions
from modelyard.corpus.files import ParquetFile, read_parquet
from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.options import ReadOptions, StepOptions
from modelyard.corpus.read.documents import read_unit
from modelyard.corpus.read.units import Unit
from modelyard.corpus.step import Step, build, split, with_reason
from modelyard.corpus.steps import groups
from modelyard.corpus.steps.scrub import Scrub
from modelyard.corpus.tally import Tally
from modelyard.storage import join

_BATCH_ROWS = 2000


@dataclass(frozen=True)
class Segment:
    """Row-wise steps between two deduplications, and where what they make goes.

    Attributes:
        index: position among the segments.
        read: how to read raw files, in the first segment only.
        source: folder of the documents of the segment before, later segments only.
        decisions: folder of the decisions that end the segment before.
        removed_by: name of the step that those decisions belong to, and its reason.
        spans: whether those decisions are spans to cut out, not documents.
        partitions: how many files the decisions are cut into, by unit.
        steps: row-wise steps.
        dedup: the deduplication that ends this segment, if any.
        documents, audit, keys: folders to write to.
        scrub: the recipe's scrub step, which also applies to excerpts in the audit.
        inputs: URIs of the files of stage inputs that steps name.
    """

    index: int
    steps: tuple[StepOptions, ...]
    documents: str
    audit: str
    read: ReadOptions | None = None
    source: str | None = None
    decisions: str | None = None
    removed_by: tuple[str, str] = ("", "")
    spans: bool = False
    partitions: int = 1
    dedup: DedupMethod | None = None
    keys: str = ""
    scrub: ScrubOptions | None = None
    inputs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass
class Done:
    """What a finished unit vouches for: files with their sizes, and its tally."""

    unit: int
    key: str
    files: dict[str, int] = field(default_factory=dict)
    tally: dict[str, Any] = field(default_factory=dict)

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def parse(cls, data: bytes) -> Done:
        """From JSON. Raises ValueError, KeyError or TypeError when it is damaged."""
        return cls(**json.loads(data))


def part(unit: int) -> str:
    """Name of a unit's file in any folder."""
    return f"part-{unit:05d}.parquet"


def run_unit(unit: Unit, segment: Segment) -> Done:
    """Does a unit of a segment and returns its record; the caller writes the record.

    Memory: a few times one batch (8 MB of text), plus what the longest document needs.
    """
    steps = [build(options, segment.inputs) for options in segment.steps]
    entry = "read" if segment.read is not None else segment.removed_by[0]
    tally = Tally.start([entry, *(options.name for options in segment.steps)])
    documents = ParquetFile(join(segment.documents, part(unit.index)))
    audit = ParquetFile(join(segment.audit, f"part-{segment.index:02d}-{unit.index:05d}.parquet"), AUDIT_SCHEMA)
    keys = ParquetFile(join(segment.keys, part(unit.index)))
    rows = 0
    for table, rejected in _batches(unit, segment, tally):
        kept, rejections = _apply(table, steps, segment, tally)
        audit.write(pa.concat_tables([rejected, *rejections]))
        if segment.dedup is not None:
            keys.write(_keys(kept, dedup.address(unit.index, kept.num_rows, rows), segment.dedup))
        rows += kept.num_rows
        tally.finish(kept, last=segment.dedup is None)
        documents.write(kept)
    for index, step in enumerate(steps, 1):
        tally.count(index, step.counts)
    written = [documents, audit, *([keys] if segment.dedup is not None else [])]
    return Done(unit.index, unit.key, {f.uri: size for f in written if (size := f.close())}, tally.plain())


def _keys(table: Any, docs: dedup.Ints, options: DedupMethod) -> Any:
    from modelyard.corpus import paragraphs, semantic

    if isinstance(options, ParagraphOptions):
        return paragraphs.keys(table, docs, options)
    if isinstance(options, SemanticOptions):
        return semantic.keys(table, docs, options)
    return dedup.keys(table, docs, options)


def _batches(unit: Unit, segment: Segment, tally: Tally) -> Iterator[tuple[Any, Any]]:
    if segment.read is not None:
        counts: Counter[str] = Counter()
        for table, bad in read_unit(unit, segment.read, counts):
            bad = hide(bad, segment.scrub)
            tally.read(table, bad)
            yield table, bad
        tally.count(0, counts)
        return
    name, reason = segment.removed_by
    if segment.spans:
        yield from _shortened(unit, segment, tally)
        return
    for table in _survivors(unit, segment, reason):
        kept, gone = split(table)
        kept = kept.drop_columns([c for c in ("twin", "jaccard") if c in kept.column_names])
        rejected = _audit(gone, name, segment)
        tally.step(0, table, kept, rejected)
        tally.count(0, groups.count(name, kept, gone))
        yield kept, rejected


def _survivors(unit: Unit, segment: Segment, reason: str) -> Iterator[Any]:
    """The documents of the segment before, with `reason`, `twin` and `jaccard` where a decision removes them."""
    uri = join(segment.source or "", part(unit.index))
    decisions = _decisions(unit, segment)
    docs = decisions["doc"].to_numpy() if decisions.num_rows else np.zeros(0, np.int64)
    row = 0
    for table in read_parquet(uri, _BATCH_ROWS):
        addresses = dedup.address(unit.index, table.num_rows, row)
        row += table.num_rows
        at = np.searchsorted(docs, addresses)
        hit = (at < len(docs)) & (docs[np.minimum(at, max(len(docs) - 1, 0))] == addresses) if len(docs) else None
        if hit is None or not hit.any():
            yield table
            continue
        index = pa.array(at, mask=~hit)
        table = table.append_column("twin", decisions["twin"].take(index))
        table = table.append_column("jaccard", decisions["jaccard"].take(index))
        yield with_reason(table, pc.if_else(pa.array(hit), reason, None))


def _shortened(unit: Unit, segment: Segment, tally: Tally) -> Iterator[tuple[Any, Any]]:
    """The documents of the segment before without the spans decided on, and audit rows: edits, and what is empty now.

    A row of an edit has `detail` = `edit` and is none of a removed document.
    """
    from modelyard.corpus import paragraphs

    name, reason = segment.removed_by
    found = _decisions(unit, segment, paragraphs.SPANS).sort_by([("doc", "ascending"), ("start", "ascending")])
    row, counts = 0, Counter[str]()
    for table in read_parquet(join(segment.source or "", part(unit.index)), _BATCH_ROWS):
        docs = dedup.address(unit.index, table.num_rows, row)
        row += table.num_rows
        if not table.num_rows:
            continue
        cut, edits, empty = paragraphs.apply(table, docs, found)
        kept, gone = split(with_reason(cut, pc.if_else(pa.array(empty), reason, None)))
        rejected = _audit(gone, name, segment)
        counts["spans_removed"] += edits.num_rows
        counts["bytes_removed"] += pc.sum(edits["bytes"]).as_py() or 0
        tally.step(0, table, kept, rejected)
        yield kept, pa.concat_tables([rejected, hide(edits, segment.scrub)])
    tally.count(0, counts)


def _decisions(unit: Unit, segment: Segment, schema: Any = dedup.DECISIONS) -> Any:
    uri = join(segment.decisions or "", part(unit.index % segment.partitions))
    first, last = unit.index << 32, (unit.index + 1) << 32
    mine = [
        table.filter(pc.and_(pc.greater_equal(table["doc"], first), pc.less(table["doc"], last)))
        for table in read_parquet(uri, 1 << 20, columns=list(schema.names))
    ]
    return pa.concat_tables(mine or [schema.empty_table()]).sort_by("doc")


def _apply(table: Any, steps: list[Step], segment: Segment, tally: Tally) -> tuple[Any, list[Any]]:
    rejections = []
    for index, step in enumerate(steps, 1):
        if table.num_rows == 0:
            break
        kept, gone = split(step(table))
        rejections.append(_audit(gone, step.name, segment))
        tally.step(index, table, kept, rejections[-1])
        step.counts.update(groups.count(step.name, kept, gone))
        table = kept
    return table, rejections


def _audit(gone: Any, step: str, segment: Segment) -> Any:
    """Audit rows; where the recipe scrubs, the excerpts of removed texts are scrubbed too."""
    return hide(removed(gone, step), segment.scrub) if gone.num_rows else AUDIT_SCHEMA.empty_table()


def hide(audit: Any, options: ScrubOptions | None) -> Any:
    """Audit rows with personal data, names too, redacted in their excerpts, which come longer than they are kept."""
    if options is not None and audit.num_rows:
        names = options.ner and options.ner.model_copy(update=dict.fromkeys(options.ner.actions, "redact"))
        hider = Scrub(options.model_copy(update={**dict.fromkeys(options.actions, "redact"), "ner": names}))
        for column in ("text", "source") if "source" in options.columns else ("text",):
            index = audit.column_names.index(column)
            audit = audit.set_column(index, column, hider.rewrite(audit[column]))
    index = audit.column_names.index("text")
    return audit.set_column(index, "text", pc.utf8_slice_codeunits(audit["text"], 0, EXCERPT))


def texts(folder: str, docs: dedup.Ints) -> Any:
    """Texts of the documents at addresses `docs`, in that order; reads the parts they lie in once each."""
    order = np.argsort(docs, kind="stable")
    wanted = docs[order]
    pieces = []
    for unit in np.unique(wanted >> 32).tolist():
        rows = wanted[(wanted >> 32) == unit] & 0xFFFFFFFF
        at = 0
        for table in read_parquet(join(folder, part(unit)), _BATCH_ROWS, columns=["text"]):
            here = rows[(rows >= at) & (rows < at + table.num_rows)] - at
            pieces.append(table["text"].take(pa.array(here)))
            at += table.num_rows
    found = pa.chunked_array([c for p in pieces for c in p.chunks], pa.string()).combine_chunks()
    back = np.empty(len(docs), np.int64)
    back[order] = np.arange(len(docs))
    return found.take(pa.array(back))
