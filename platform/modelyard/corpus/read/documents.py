"""From records to Arrow tables of documents and audit rows, a bounded batch at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from modelyard.corpus.audit import EXCERPT, MARGIN, audit_table
from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.formats import records
from modelyard.corpus.read.records import Bad, Record, Skipped
from modelyard.corpus.read.units import Piece, Unit
from modelyard.storage import is_remote

_BATCH_BYTES = 8_000_000  # text a batch: bounds a worker's memory, keeps kernels' scratch small
_SMALL, _THREADS = 1_000_000, 16


@dataclass
class _Pending:
    rows: list[tuple[str, str, str, str, str | None]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)
    bytes: int = 0


def document_id(piece: Piece, position: int) -> str:
    """128-bit id from the file's content, the number of equal files before it, and the place in it."""
    content = f"{piece.digest}|{piece.copy}|{position}"
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def read_unit(unit: Unit, options: ReadOptions, counts: Counter[str] | None = None) -> Iterator[tuple[Any, Any]]:
    """(documents, quarantined records) of a unit, in batches of about 8 MB of text.

    Documents have id, text, source, meta (JSON) and, where the format gives one, prompt; quarantined
    records are audit rows of the step `read`. Records that carry no document by their nature, such as the
    requests in a WARC file, are added up in `counts` by kind.
    """
    counts = Counter() if counts is None else counts
    # The options decide the columns, not the data: all units of a stage write the same schema.
    prompts = options.prompt is not None or options.python == "docstrings" or any(p.artifact for p in unit.pieces)
    pending = _Pending()
    for piece, found in _in_order(unit, options):
        for record in found:
            if isinstance(record, Skipped):
                counts[record.kind] += 1
                continue
            _add(pending, piece, record)
            if pending.bytes >= _BATCH_BYTES:
                yield _tables(pending, prompts)
                pending = _Pending()
    if pending.rows or pending.bad:
        yield _tables(pending, prompts)


def _in_order(unit: Unit, options: ReadOptions) -> Iterator[tuple[Piece, Iterable[Record | Bad | Skipped]]]:
    """The records of each piece; small files of an object store are fetched ahead, for each costs a round trip."""
    ahead: deque[tuple[Piece, Future[list[Record | Bad | Skipped]] | None]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for piece in unit.pieces:
            small = is_remote(piece.uri) and piece.bytes <= _SMALL
            ahead.append((piece, pool.submit(lambda p: list(records(p, options)), piece) if small else None))
            while len(ahead) >= 2 * _THREADS:
                yield _take(ahead, options)
        while ahead:
            yield _take(ahead, options)


def _take(ahead: deque[Any], options: ReadOptions) -> tuple[Piece, Iterable[Record | Bad | Skipped]]:
    piece, future = ahead.popleft()
    return piece, records(piece, options) if future is None else future.result()


def _add(pending: _Pending, piece: Piece, record: Record | Bad) -> None:
    if isinstance(record, Bad):
        offset = record.position if record.offset is None else record.offset
        pending.bad.append(
            {
                "id": document_id(piece, record.position), "source": piece.uri, "step": "read", "reason": record.reason,
                "bytes": record.bytes, "text": record.excerpt[: EXCERPT + MARGIN], "offset": max(offset, 0),
                "detail": record.detail,
            }
        )  # fmt: skip
        pending.bytes += 1000
        return
    meta = json.dumps(record.meta, ensure_ascii=False, default=str) if record.meta else "{}"
    meta = meta.encode("utf-8", "replace").decode()
    identity = record.id or document_id(piece, record.position)
    pending.rows.append((identity, record.text, record.source or piece.uri, meta, record.prompt))
    pending.bytes += len(record.text) + len(meta)


def _tables(pending: _Pending, prompts: bool) -> tuple[Any, Any]:
    columns = list(zip(*pending.rows, strict=True)) if pending.rows else [(), (), (), (), ()]
    names = ["id", "text", "source", "meta", "prompt"]
    table = pa.table({n: pa.array(c, pa.string()) for n, c in zip(names, columns, strict=True)})
    return (table if prompts else table.drop_columns(["prompt"])), audit_table(pending.bad)
