"""Small reference files that a step needs whole: evaluation sets, word lists, models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.corpus.read.streams import Damaged, chunks, compression
from modelyard.errors import DataError
from modelyard.storage import arrow_filesystem


def base(uri: str) -> str:
    """File name without folder and compression suffix."""
    name = uri.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if compression(uri) else name


def read_text(uri: str) -> str:
    """The whole of a (possibly compressed) UTF-8 file.

    Raises:
        DataError: it cannot be read, or is not UTF-8.
    """
    try:
        return b"".join(chunks(uri)).decode("utf-8-sig")
    except Damaged as error:
        raise DataError(f"cannot be read: {error}", place=uri, mend="give a whole file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"is not UTF-8: {error.reason} at byte {error.start}", place=uri, mend="convert it") from error


def evaluation_items(uris: tuple[str, ...], fields: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(name, text) of every evaluation item: a line of JSONL, a row of Parquet, a paragraph of text.

    Each of `fields`, or each string at any depth when none is named, is a text of its own under the same
    name, so that no n-gram joins a question to an answer it does not stand beside.

    Raises:
        DataError: a file cannot be read, or holds none of the fields.
    """
    for uri in uris:
        any_text = False
        for number, record in enumerate(_records(uri), 1):
            for value in _strings(record, fields):
                any_text = True
                yield f"{base(uri)}:{number}", value
        if not any_text:
            raise DataError(
                f"no text in the fields {', '.join(fields) or '(any)'}",
                place=uri,
                mend="name the right `fields`",
            )


def _records(uri: str) -> Iterator[Any]:
    name = base(uri).lower()
    if name.endswith(".parquet"):
        fs, path = arrow_filesystem(uri)
        try:
            with fs.open_input_file(path) as handle:
                for batch in pq.ParquetFile(handle).iter_batches(batch_size=1000):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"is no readable Parquet file: {error}", place=uri) from error
    elif name.endswith((".jsonl", ".ndjson", ".json")):
        lines = read_text(uri).splitlines() if not name.endswith(".json") else []
        try:
            if name.endswith(".json"):
                whole = json.loads(read_text(uri))
                yield from whole if isinstance(whole, list) else [whole]
            for line in lines:
                if line.strip():
                    yield json.loads(line)
        except ValueError as error:
            raise DataError(f"is not JSON: {error}", place=uri, mend="one JSON value a line in .jsonl") from error
    else:
        yield from (p for p in read_text(uri).replace("\r\n", "\n").split("\n\n") if p.strip())


def _strings(value: Any, fields: tuple[str, ...]) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        chosen = [value[f] for f in fields if f in value] if fields else value.values()
        for inner in chosen:
            yield from _strings(inner, ())
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, fields)
