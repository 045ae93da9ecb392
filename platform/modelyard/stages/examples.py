"""Examples out of a stage's input: JSON lines, JSON, Parquet, plain or gzipped, or another stage's data.

A record that cannot be used goes to the quarantine with its place and the reason; too many of them are an error that
names the first. Everything is held in memory: fine-tuning data are small beside a corpus.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from modelyard.errors import DataError
from modelyard.storage import Artifact, FileRef, Files, arrow_filesystem, list_files, read_bytes

KNOWN = ("prompt", "messages", "conversations", "instruction", "chosen", "transcript", "question")
_SHOWN = 2000
"""Characters of a bad record that the quarantine keeps."""


class Keyed(Protocol):
    """An example that knows on which side of the held-out split it falls."""

    @property
    def key(self) -> int:
        """64-bit hash."""
        ...


T = TypeVar("T")
K = TypeVar("K", bound=Keyed)


@dataclass(frozen=True)
class Rejected:
    """A record that could not be used."""

    place: str
    reason: str
    record: str

    def line(self) -> str:
        """As one JSON line."""
        return json.dumps({"place": self.place, "reason": self.reason, "record": self.record}) + "\n"


@dataclass(frozen=True)
class Examples(Generic[T]):
    """What could be read, and what could not."""

    good: list[T]
    bad: list[Rejected]

    def quarantine(self) -> bytes:
        """Content of `quarantine.jsonl`."""
        return "".join(row.line() for row in self.bad).encode()


def read_examples(
    data: Artifact | Files, parse: Callable[[Mapping[str, Any], str], T | list[T]], allowed: float
) -> Examples[T]:
    """All examples of an input in a fixed order.

    Args:
        data: files, or the artifact of a stage that writes `data/`.
        parse: makes one or several examples of a record, or raises DataError.
        allowed: share of records that may be bad.

    Raises:
        DataError: there is nothing usable, or more records are bad than allowed; names the first.
    """
    good: list[T] = []
    bad: list[Rejected] = []
    first: DataError | None = None
    for record, place in _records(data):
        try:
            if isinstance(record, DataError):
                raise record
            found = parse(record, place)
        except DataError as error:
            first = first or error
            shown = json.dumps(record, ensure_ascii=False, default=str) if isinstance(record, dict) else ""
            bad.append(Rejected(place, error.what, shown[:_SHOWN]))
            continue
        good.extend(found if isinstance(found, list) else [found])
    if first is not None and len(bad) > allowed * (len(bad) + len(good)):
        more = f" ({len(bad):,} of {len(bad) + len(good):,} records cannot be used)" if len(bad) > 1 else ""
        raise DataError(
            first.what + more,
            place=first.place or bad[0].place,
            mend=(f"{first.mend}, or " if first.mend else "") + "allow more of them (examples.bad_rows)",
        )
    if not good:
        raise DataError("there are no pairs to train on", place=name_of(data), mend="give more input")
    return Examples(good, bad)


def split(examples: Sequence[K], heldout: float) -> tuple[list[K], list[K]]:
    """Training and held-out examples by a hash of their content, so equal ones fall on one side, on every machine."""
    kept: list[K] = []
    held: list[K] = []
    for example in examples:
        (held if example.key / 2**64 < heldout else kept).append(example)
    return kept, held


def name_of(data: Artifact | Files) -> str:
    """What to call an input in a message."""
    return data.uri if isinstance(data, Artifact) else data.refs[0].uri


def guessed_sequences(
    data: Artifact | Files | None, length: int, heldout: float, token_bytes: float = 4.0
) -> int | None:
    """About how many training sequences of `length` tokens an input packs into, from its bytes alone, which are 3 times
    as many where they are compressed. None = it is not there yet."""
    if data is None:
        return None
    files = list_files(data.join("data")) if isinstance(data, Artifact) else [(r.uri, r.bytes) for r in data.refs]
    text = sum(size * (3 if name.endswith((".gz", ".parquet")) else 1) for name, size in files)
    return max(1, round(text * (1 - heldout) / token_bytes / length))


def read_records(data: Artifact | Files) -> Iterator[tuple[dict[str, Any], str]]:
    """Every record with its place. Raises DataError at the first that is not a JSON object."""
    for record, place in _records(data):
        if isinstance(record, DataError):
            raise record
        yield record, place


def _records(data: Artifact | Files) -> Iterator[tuple[dict[str, Any] | DataError, str]]:
    uris = [data.join("data", name) for name, _ in list_files(data.join("data"))] if isinstance(data, Artifact) else []
    refs: Sequence[FileRef] = () if isinstance(data, Artifact) else data.refs
    for uri in [*uris, *(ref.uri for ref in refs)]:
        yield from _parquet(uri) if uri.endswith(".parquet") else _lines(uri)


def _parquet(uri: str) -> Iterator[tuple[dict[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    filesystem, path = arrow_filesystem(uri)
    try:
        file = pq.ParquetFile(path, filesystem=filesystem)
    except pa.ArrowInvalid as error:
        raise DataError(f"cannot be read as Parquet: {error}", place=uri, mend="write the file again") from error
    if not set(KNOWN) & set(file.schema_arrow.names):
        raise DataError(
            f"the data has no column prompt, nor any of {', '.join(KNOWN[1:])}",
            place=uri,
            mend="curate pairs (read: {python: docstrings}) or give JSONL with prompt and completion",
        )
    row = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            yield {name: value for name, value in record.items() if value is not None}, f"{uri}:row {row}"
            row += 1


def _lines(uri: str) -> Iterator[tuple[dict[str, Any] | DataError, str]]:
    text = _text(uri)
    if uri.removesuffix(".gz").endswith(".json") and text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", place=uri, mend="mend the file, or give one object a line") from error
        for number, record in enumerate(records):
            yield _object(record, f"{uri}:record {number}"), f"{uri}:record {number}"
        return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{uri}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            yield DataError(f"not JSON: {error}", place=place), place
            continue
        yield _object(record, place), place


def _text(uri: str) -> str:
    content = read_bytes(uri)
    try:
        return (gzip.decompress(content) if uri.endswith(".gz") else content).decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot be unpacked: {error}", place=uri, mend="gzip the file again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", place=uri, mend="convert the file to UTF-8") from error


def _object(record: Any, place: str) -> dict[str, Any] | DataError:
    if not isinstance(record, dict):
        return DataError("not a JSON object", place=place, mend="one object a line")
    return {name: value for name, value in record.items() if value is not None}
