"""Repeated paragraphs as phases: digests of each document's paragraphs, then spans to cut.

    keys      a table of documents               -> doc, rank, id, start, end, keys   (in the pass that has the text)
    repeated  paragraphs that share a partition  -> doc, twin, start, end             (shuffled by digest)
    apply     documents and their spans          -> documents without them            (in the next pass)

A paragraph goes when equal bytes stand in a preferred document, or before it in the same one. Equality is that
of 128-bit BLAKE2b digests: no two different texts are known to share one. Memory: 60 bytes a paragraph of one
partition, and one batch of documents.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.arrow import buffers, lengths, strings
from modelyard.corpus.audit import AUDIT_SCHEMA, EXCERPT, MARGIN
from modelyard.corpus.dedup import Ints, key_matrix, ranks
from modelyard.corpus.dedup_options import ParagraphOptions

SPANS = pa.schema([("doc", pa.int64()), ("twin", pa.string()), ("start", pa.int64()), ("end", pa.int64())])
REASON = "repeated_paragraphs"
EDIT = "repeated_paragraph"


def keys(table: Any, docs: Ints, options: ParagraphOptions) -> Any:
    """A row for each paragraph of a table of documents that is long enough."""
    from modelyard.corpus.kernels.paragraphs import spans

    data, offsets = buffers(table["text"])
    rows, starts, ends = spans(data, offsets, options.unit == "line", options.min_length)
    bounds = zip((offsets[rows] + starts).tolist(), (offsets[rows] + ends).tolist(), strict=True)
    view = data.data
    digests = b"".join(hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in bounds)
    return pa.table(
        {
            "doc": pa.array(docs[rows]),
            "rank": pa.array(ranks(table, options.keep)[rows]),
            "id": table["id"].combine_chunks().take(pa.array(rows)),
            "start": pa.array(starts),
            "end": pa.array(ends),
            "keys": pa.FixedSizeListArray.from_arrays(pa.array(np.frombuffer(digests, "<u8")), 2),
        }
    )


def repeated(table: Any) -> Any:
    """The spans to cut (SPANS, sorted by doc and start) among paragraphs of one partition: all but the best copy."""
    if not table.num_rows:
        return SPANS.empty_table()
    matrix = key_matrix(table)
    columns = [table[name].to_numpy() for name in ("start", "doc", "rank")]
    order = np.lexsort((*columns, matrix[:, 1], matrix[:, 0]))
    matrix = matrix[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (matrix[1:] != matrix[:-1]).any(axis=1)
    best = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    gone, kept = pa.array(order[~fresh]), pa.array(best[~fresh])
    cut = table.select(["doc", "start", "end"]).take(gone)
    found = [cut["doc"], table["id"].take(kept), cut["start"], cut["end"]]
    return pa.table(found, schema=SPANS).sort_by([("doc", "ascending"), ("start", "ascending")])


def apply(table: Any, docs: Ints, found: Any) -> tuple[Any, Any, npt.NDArray[np.bool_]]:
    """Documents without the spans that were found in them.

    Args:
        table: documents.
        docs: their addresses, ascending.
        found: SPANS of these documents and others, sorted by doc and start.

    Returns:
        the documents with new texts; audit rows of the edits, a row a span; and which documents have no text left.
    """
    from modelyard.corpus.kernels.paragraphs import cut

    first, last = int(docs[0]), int(docs[-1])
    mine = found.filter(pc.and_(pc.greater_equal(found["doc"], first), pc.less_equal(found["doc"], last)))
    none = np.zeros(table.num_rows, bool)
    if not mine.num_rows:
        return table, AUDIT_SCHEMA.empty_table(), none
    rows = np.searchsorted(docs, mine["doc"].to_numpy())
    starts, ends = mine["start"].to_numpy(), mine["end"].to_numpy()
    data, offsets = buffers(table["text"])
    text = strings(*cut(data, offsets, rows, starts, ends)).cast(table.schema.field("text").type)
    edits = _edits(table, rows, mine, strings(*_pieces(data, offsets[rows] + starts, offsets[rows] + ends)))
    changed = np.zeros(table.num_rows, bool)
    changed[rows] = True
    empty = changed & (lengths(pc.utf8_trim_whitespace(text)) == 0)
    # The row of a document that goes keeps its text: the audit shows what it was.
    text = pc.if_else(pa.array(empty), table["text"].combine_chunks(), text)
    return table.set_column(table.column_names.index("text"), "text", text), edits, empty


def _pieces(data: Any, starts: Ints, ends: Ints) -> tuple[Any, Any]:
    sizes = ends - starts
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    places = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], sizes)
    return data[places], offsets


def _edits(table: Any, rows: Ints, found: Any, pieces: Any) -> Any:
    index, n = pa.array(rows), len(rows)
    columns = {
        "id": table["id"].take(index), "source": table["source"].take(index),
        "step": pa.array(["dedup_paragraphs"] * n), "reason": pa.array([EDIT] * n), "twin": found["twin"],
        "bytes": pc.subtract(found["end"], found["start"]), "offset": found["start"],
        "text": pc.utf8_slice_codeunits(pieces, 0, EXCERPT + MARGIN), "detail": pa.array(["edit"] * n),
    }  # fmt: skip
    return pa.table([columns.get(f.name, pa.nulls(n, f.type)) for f in AUDIT_SCHEMA], schema=AUDIT_SCHEMA)
