"""Records out of files, by format; text, JSON lines, Parquet and Python docstrings are read here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.docstrings import docstrings
from modelyard.corpus.read.records import Bad, Record, Skipped
from modelyard.corpus.read.streams import Damaged, lines, whole
from modelyard.corpus.read.units import Piece, file_format
from modelyard.corpus.read.web import html_file, warc_file
from modelyard.storage import arrow_filesystem


def records(piece: Piece, options: ReadOptions) -> Iterator[Record | Bad | Skipped]:
    """All records of a piece, readable or not. Never raises for what is wrong with the data."""
    kind = file_format(piece.uri, options)
    try:
        if piece.bytes == 0:
            yield Bad(0, "empty_file")
        elif kind == "jsonl":
            yield from _jsonl(piece, options)
        elif kind == "parquet":
            yield from _parquet(piece, options)
        elif kind == "warc":
            yield from warc_file(piece, options)
        elif kind == "html":
            yield html_file(piece, options)
        elif piece.uri.endswith(".py") and options.python == "docstrings":
            yield from _python(piece, options)
        else:
            yield _text(piece, options)
    except Damaged as error:
        yield Bad(-1, error.reason, error.detail, piece.bytes)


def _decode(data: bytes, position: int) -> str | Bad:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        excerpt = data[max(error.start - 40, 0) : error.start + 40].decode("utf-8", "backslashreplace")
        return Bad(position + error.start, "invalid_utf8", f"{error.reason} at byte {error.start}", len(data), excerpt)


def _text(piece: Piece, options: ReadOptions) -> Record | Bad:
    data = whole(piece.uri, options.max_document_bytes)
    text = _decode(data, 0)
    if isinstance(text, Bad):
        return text
    if "\0" in text:
        return Bad(text.index("\0"), "binary", "a NUL character", len(data))
    return Record(0, text) if text.strip() else Bad(0, "empty_file", "", len(data))


def _python(piece: Piece, options: ReadOptions) -> Iterator[Record | Bad]:
    source = _text(piece, options)
    if isinstance(source, Bad):
        # A module without a line is normal in Python packages and holds no record.
        if source.reason != "empty_file":
            yield source
        return
    try:
        found = list(docstrings(source.text))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        line = getattr(error, "lineno", None) or 0
        yield Bad(line, "bad_syntax", f"{type(error).__name__}: {error}"[:200], piece.bytes, source.text[:200])
        return
    for number, item in enumerate(found):
        text = item.text.encode("utf-8", "replace").decode()
        if len(text) >= options.min_docstring_chars and item.signature:
            yield Record(number, text, item.signature, {"name": item.name, "line": item.line})


def _jsonl(piece: Piece, options: ReadOptions) -> Iterator[Record | Bad]:
    for offset, line in lines(piece.uri, piece.start, piece.end, options.max_document_bytes):
        if line is None:
            yield Bad(offset, "too_large", f"more than {options.max_document_bytes:,} bytes")
        elif line.strip():
            yield _json(line, offset, options)


def _json(line: bytes, offset: int, options: ReadOptions) -> Record | Bad:
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        return _bad(offset + error.start, "invalid_utf8", f"{error.reason} at byte {error.start}", line)
    except (ValueError, RecursionError) as error:
        return _bad(offset, "invalid_json", str(error), line)
    if not isinstance(record, dict):
        return _bad(offset, "invalid_json", f"a {type(record).__name__}, not an object", line)
    result = _fields(offset, record, options)
    return result if isinstance(result, Record) else _bad(offset, result[0], result[1], line)


def _bad(position: int, reason: str, detail: str, data: bytes) -> Bad:
    return Bad(position, reason, detail[:200], len(data), data[:200].decode("utf-8", "backslashreplace"))


def _fields(position: int, record: dict[str, Any], options: ReadOptions) -> Record | tuple[str, str]:
    """The record's text, prompt and everything else as metadata; or a reason and a detail."""
    text = record.pop(options.text, None)
    if text is None:
        return "missing_text", f"no field {options.text!r}"
    if not isinstance(text, str):
        return "text_not_string", f"field {options.text!r} is a {type(text).__name__}"
    if not text.strip():
        return "empty_text", ""
    prompt = None
    if options.prompt is not None:
        prompt = text if options.prompt == options.text else record.pop(options.prompt, None)
        if not isinstance(prompt, str):
            return "missing_prompt", f"no text in field {options.prompt!r}"
    try:
        (text + (prompt or "")).encode()
    except UnicodeEncodeError as error:
        return "invalid_unicode", f"a lone surrogate at character {error.start}"
    return Record(position, text, prompt, record)


def _parquet(piece: Piece, options: ReadOptions) -> Iterator[Record | Bad]:
    fs, path = arrow_filesystem(piece.uri)
    row = 0
    try:
        with fs.open_input_file(path) as handle:
            file = pq.ParquetFile(handle)
            wanted = [options.text, *([options.prompt] if options.prompt else [])]
            if absent := [name for name in wanted if name not in file.schema_arrow.names]:
                names = ", ".join(file.schema_arrow.names)
                yield Bad(0, "missing_column", f"no column {absent[0]!r}; there are: {names}"[:200], piece.bytes)
                return
            for batch in file.iter_batches(batch_size=512):
                for record in batch.to_pylist():
                    yield _row(row, record, piece, options)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        yield Bad(row, "corrupt" if row else "unreadable", str(error)[:200], piece.bytes)


def _row(row: int, record: dict[str, Any], piece: Piece, options: ReadOptions) -> Record | Bad:
    own: dict[str, Any] = {"id": None, "source": None}
    if piece.artifact:
        own = {name: record.pop(name, None) for name in ("id", "source", "meta")}
        record |= json.loads(own.pop("meta") or "{}")
        if options.prompt is None and isinstance(record.get("prompt"), str):
            own["prompt"] = record.pop("prompt")
    size = len(record.get(options.text) or "") if isinstance(record.get(options.text), str) else 0
    if size > options.max_document_bytes:
        return Bad(row, "too_large", f"{size:,} characters", size)
    result = _fields(row, record, options)
    if isinstance(result, tuple):
        return Bad(row, result[0], result[1])
    prompt = own.get("prompt") or result.prompt
    return Record(row, result.text, prompt, result.meta, own["id"], own["source"])
