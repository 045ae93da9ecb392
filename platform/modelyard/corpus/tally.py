"""What happened to the documents, counted unit by unit and added up: the numbers behind funnel and report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.arrow import lengths

SAMPLES = 12
_SAMPLE_CHARS = 1500
SCORE_BINS = 20  # of scores, which lie between 0 and 1
_BINS = 32  # length histogram: powers of two of bytes


@dataclass
class StepTally:
    """One step: what went in and came out, why the rest went, and what the step counted itself."""

    name: str
    documents_in: int = 0
    bytes_in: int = 0
    documents: int = 0
    bytes: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass
class Tally:
    """All steps of a segment, plus samples, lengths, languages and scores of what came out at its end.

    Samples are the documents with the smallest ids: ids are hashes, so this is a fair and repeatable draw.
    """

    steps: list[StepTally]
    kept: list[dict[str, Any]] = field(default_factory=list)
    removed: list[dict[str, Any]] = field(default_factory=list)
    twins: list[dict[str, Any]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [0] * _BINS)
    removed_lengths: list[int] = field(default_factory=lambda: [0] * _BINS)
    languages: dict[str, int] = field(default_factory=dict)
    scores: dict[str, list[int]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)

    @classmethod
    def start(cls, names: Iterable[str]) -> Tally:
        """An empty tally of the named steps, in order."""
        return cls([StepTally(name) for name in names])

    def read(self, table: Any, bad: Any) -> None:
        """Counts what a reader returned: every record, readable or not, is a document that came in."""
        step = self.steps[0]
        size = int(lengths(table["text"]).sum()) if table.num_rows else 0
        lost = int(pc.sum(bad["bytes"]).as_py() or 0)
        step.documents_in += table.num_rows + bad.num_rows
        step.bytes_in += size + lost
        step.documents += table.num_rows
        step.bytes += size
        self._reasons(step, bad)

    def step(self, index: int, before: Any, after: Any, rejected: Any) -> None:
        """Counts one table's way through step number `index`."""
        step = self.steps[index]
        step.documents_in += before.num_rows
        step.bytes_in += int(lengths(before["text"]).sum())
        step.documents += after.num_rows
        step.bytes += int(lengths(after["text"]).sum()) if after.num_rows else 0
        self._reasons(step, rejected)

    def _reasons(self, step: StepTally, rejected: Any) -> None:
        if not rejected.num_rows:
            return
        for item in pc.value_counts(rejected["reason"]).to_pylist():
            step.reasons[item["values"]] = step.reasons.get(item["values"], 0) + item["counts"]
        self.removed_lengths = _added(self.removed_lengths, _histogram(pc.fill_null(rejected["bytes"], 0)))
        self.removed = _sample([*self.removed, *_rows(rejected, SAMPLES)], SAMPLES)
        twins = rejected.filter(rejected["twin"].is_valid())
        self.twins = _sample([*self.twins, *_rows(twins, SAMPLES)], SAMPLES)

    def finish(self, kept: Any, last: bool) -> None:
        """Takes samples and lengths of what is left; only the last segment's count."""
        if not last or not kept.num_rows:
            return
        self.lengths = _added(self.lengths, _histogram(lengths(kept["text"])))
        if "language" in kept.column_names:
            for item in pc.value_counts(kept["language"]).to_pylist():
                self.languages[item["values"]] = self.languages.get(item["values"], 0) + item["counts"]
        for name in _score_columns(kept.schema):
            values = pc.fill_null(kept[name], 0).to_numpy().clip(0, 1)
            counted = np.bincount((values * SCORE_BINS).astype(int).clip(0, SCORE_BINS - 1), minlength=SCORE_BINS)
            self.scores[name] = _added(self.scores.get(name, [0] * SCORE_BINS), counted)
        self.kept = _sample([*self.kept, *_rows(kept, SAMPLES)], SAMPLES)
        for source in pc.value_counts(kept["source"]).to_pylist():
            suffix = source["values"].rsplit("/", 1)[-1]
            kind = suffix.rsplit(".", 1)[-1].lower() if "." in suffix else suffix
            self.sources[kind[:24]] = self.sources.get(kind[:24], 0) + source["counts"]

    def count(self, index: int, counts: Mapping[str, int]) -> None:
        """Adds what step number `index` counted itself."""
        self.steps[index].counts = dict(Counter(self.steps[index].counts) + Counter(counts))

    def plain(self) -> dict[str, Any]:
        """As JSON-able values."""
        return asdict(self)

    @classmethod
    def parse(cls, plain: Mapping[str, Any]) -> Tally:
        """From `plain()`."""
        return cls(**{**plain, "steps": [StepTally(**s) for s in plain["steps"]]})

    def add(self, other: Tally) -> None:
        """Adds another unit of the same segment."""
        for mine, theirs in zip(self.steps, other.steps, strict=True):
            for name in ("documents_in", "bytes_in", "documents", "bytes"):
                setattr(mine, name, getattr(mine, name) + getattr(theirs, name))
            mine.reasons = dict(Counter(mine.reasons) + Counter(theirs.reasons))
            mine.counts = dict(Counter(mine.counts) + Counter(theirs.counts))
        for name in ("kept", "removed", "twins"):
            setattr(self, name, _sample([*getattr(self, name), *getattr(other, name)], SAMPLES))
        self.lengths = _added(self.lengths, other.lengths)
        self.removed_lengths = _added(self.removed_lengths, other.removed_lengths)
        for name, bins in other.scores.items():
            self.scores[name] = _added(self.scores.get(name, [0] * SCORE_BINS), bins)
        self.languages = dict(Counter(self.languages) + Counter(other.languages))
        self.sources = dict(Counter(self.sources) + Counter(other.sources))


def _histogram(sizes: Any) -> Any:
    """Documents by the power of two of their bytes."""
    bins = np.minimum(np.log2(np.maximum(np.asarray(sizes), 1)).astype(int), _BINS - 1)
    return np.bincount(bins, minlength=_BINS)


def _added(one: Iterable[int], other: Iterable[int]) -> list[int]:
    return [int(a) + int(b) for a, b in zip(one, other, strict=True)]


def _score_columns(schema: Any) -> list[str]:
    """Columns of numbers between 0 and 1 that steps have added; statistics are of other kinds."""
    return [f.name for f in schema if pa.types.is_floating(f.type) and not f.name.startswith("stat_")]


def _rows(table: Any, most: int) -> list[dict[str, Any]]:
    if not table.num_rows:
        return []
    order = pc.sort_indices(table["id"])[:most]
    names = [
        n for n in ("id", "source", "step", "reason", "twin", "jaccard", "prompt", "text") if n in table.column_names
    ]
    rows: list[dict[str, Any]] = table.select(names).take(order).to_pylist()
    return [{**row, "text": (row["text"] or "")[:_SAMPLE_CHARS]} for row in rows]


def _sample(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda r: (str(r["id"]), str(r.get("reason"))))[:most]
