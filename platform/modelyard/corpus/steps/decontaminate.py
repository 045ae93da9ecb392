"""Documents that hold text of evaluation sets, by n-grams of words (Brown et al. 2020, appendix C)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pyarrow as pa

from modelyard.corpus.arrow import buffers, replace
from modelyard.corpus.filter_options import DecontaminateOptions
from modelyard.corpus.items import evaluation_items
from modelyard.corpus.step import DETAIL, Step, put, reasons_from, with_reason

_NAMED = 5  # items that an audit row names


@functools.lru_cache(2)
def _evaluation(uris: tuple[str, ...], fields: tuple[str, ...], ngram: int, least: int) -> tuple[Any, list[str]]:
    """(phrases, name of each item). Kept for all units that a worker does."""
    from modelyard.corpus.kernels.phrases import Phrases

    names, texts = [], []
    for name, text in evaluation_items(uris, fields):
        names.append(name)
        texts.append(text)
    data, offsets = buffers(pa.array(texts, pa.large_string()))
    return Phrases.build(data, offsets, ngram, least), names


class Decontaminate(Step):
    """Drops, cuts or tags documents that share n-grams with evaluation items. See `DecontaminateOptions`.

    Counts `ITEM/documents` for every item hit, once a document. Memory: the evaluation sets, their n-grams at 56
    bytes each, and one batch.

    Raises:
        DataError: an evaluation file cannot be read or has no text.
    """

    name = "decontaminate"

    def __init__(self, options: DecontaminateOptions, uris: tuple[str, ...]) -> None:
        super().__init__()
        self.options = options
        self._phrases, self._names = _evaluation(uris, options.fields, options.ngram, options.min_words)

    @property
    def adds(self) -> tuple[str, ...]:
        """In annotate mode `contamination`: int32, n-grams of the document that evaluation items have."""
        return ("contamination",) if self.options.mode == "annotate" else ()

    def __call__(self, table: Any) -> Any:
        hits, _ = self._phrases.find(*buffers(table["text"]))
        counts = np.zeros(table.num_rows, np.int32)
        if len(hits):
            # An n-gram that several items have is one hit.
            places = np.unique(hits[:, [0, 2, 3]], axis=0)
            counts += np.bincount(places[:, 0], minlength=table.num_rows).astype(np.int32)
        hit = counts >= self.options.min_hits
        hits = hits[hit[hits[:, 0]]]
        details = self._details(hits, table.num_rows)
        self.counts["contaminated"] += int(hit.sum())
        if self.options.mode == "annotate":
            return with_reason(put(table, "contamination", pa.array(counts)), pa.nulls(table.num_rows, pa.string()))
        reasons = reasons_from([("contaminated", hit)], table.num_rows)
        if self.options.mode == "cut":
            table, reasons = self._cut(table, hits, np.flatnonzero(hit))
        return with_reason(put(table, DETAIL, pa.array(details, pa.string())), reasons)

    def _details(self, hits: Any, rows: int) -> list[str | None]:
        details: list[str | None] = [None] * rows
        for row in np.unique(hits[:, 0]).tolist():
            names = sorted({self._names[i] for i in hits[hits[:, 0] == row, 1].tolist()})
            self.counts.update(f"{name}/documents" for name in names)
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            details[row] = ", ".join(names[:_NAMED]) + more
        return details

    def _cut(self, table: Any, hits: Any, rows: Any) -> tuple[Any, Any]:
        """Texts without the n-grams and what stands around them; too little left is a reason to go."""
        _, offsets = buffers(table["text"])
        texts: list[str] = []
        reasons: list[str | None] = [None] * table.num_rows
        for row in rows.tolist():
            spans = np.unique(hits[hits[:, 0] == row][:, 2:], axis=0) - offsets[row]
            left = self._without(table["text"][row].as_py(), spans.tolist())
            texts.append(left)
            if len(left) < self.options.min_chars:
                reasons[row] = "contaminated_short"
            else:
                self.counts["cut"] += 1
        index = table.column_names.index("text")
        # A document that goes keeps its text for the audit.
        keep = [i for i, row in enumerate(rows.tolist()) if reasons[row] is None]
        text = replace(table["text"], rows[keep], [texts[i] for i in keep])
        return table.set_column(index, "text", text), pa.array(reasons, pa.string())

    def _without(self, text: str, spans: list[list[int]]) -> str:
        raw, around = text.encode(), self.options.context
        parts: list[str] = []
        at = 0
        for first, last in spans:
            begin = max(len(raw[:first].decode()) - around, 0)
            end = len(raw[:last].decode()) + around
            if begin > at:
                parts.append(text[at:begin])
            at = max(at, end)
        return "\n".join(p for p in [*parts, text[at:]] if p.strip())
