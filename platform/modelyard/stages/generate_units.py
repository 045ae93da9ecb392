"""Rows of JSONL and Parquet files as units of work: planned once, read and written again in any process.

A unit is a run of neighbouring rows of one file. It becomes one file of the output in the same format, row for
row: a JSONL line keeps its keys, a Parquet row its columns, and each gains the same five fields.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError
from modelyard.storage import arrow_filesystem, write_bytes

if TYPE_CHECKING:
    import pyarrow as pa

_BLOCK = 8 << 20
"""Bytes of JSONL looked at together while lines are counted."""


@dataclass(frozen=True)
class Unit:
    """`rows` rows of a file from row `first` on; `first_row` counts over all files.

    `start` and `end` are byte offsets in a JSONL file, 0 for Parquet.
    """

    index: int
    uri: str
    first: int
    rows: int
    first_row: int
    start: int = 0
    end: int = 0

    @property
    def parquet(self) -> bool:
        """Whether the file is Parquet; else it is JSONL."""
        return self.uri.endswith(".parquet")

    @property
    def part(self) -> str:
        """Name of the output file."""
        return f"part-{self.index:05d}." + ("parquet" if self.parquet else "jsonl")


@dataclass(frozen=True)
class Answer:
    """What one row gains. `error` says why there is no text."""

    text: str | None = None
    finish: str | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None
    score: float | None = None

    def fields(self, name: str, scored: bool = False) -> dict[str, Any]:
        """The row's new fields under the output's name; `scored`: its reward among them."""
        return {
            name: self.text, f"{name}_finish": self.finish, f"{name}_tokens": self.tokens,
            f"{name}_prompt_tokens": self.prompt_tokens, f"{name}_error": self.error,
        } | ({f"{name}_score": self.score} if scored else {})  # fmt: skip


def plan(uris: Sequence[str], rows_a_unit: int, name: str, scored: bool = False) -> list[Unit]:
    """Units of the files in order. JSONL files are read through once to find where lines begin.

    Raises:
        DataError: a file that is neither .jsonl nor .parquet, or is damaged, or already has a column of ours.
    """
    units: list[Unit] = []
    for uri in uris:
        suffix = PurePosixPath(uri).suffix
        if suffix == ".parquet":
            units += _parquet_units(uri, rows_a_unit, units, set(Answer().fields(name, scored)))
        elif suffix in (".jsonl", ".ndjson"):
            units += _jsonl_units(uri, rows_a_unit, units)
        else:
            raise DataError(f"{suffix or 'no'} suffix", place=uri, mend="give .jsonl or .parquet files")
    return units


def _next(units: Sequence[Unit]) -> tuple[int, int]:
    """(index, first row) of the unit after these."""
    return (len(units), units[-1].first_row + units[-1].rows) if units else (0, 0)


def _parquet_units(uri: str, size: int, before: Sequence[Unit], ours: set[str]) -> list[Unit]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    fs, path = arrow_filesystem(uri)
    try:
        with pq.ParquetFile(path, filesystem=fs) as file:
            total, columns = file.metadata.num_rows, set(file.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"not a readable Parquet file: {error}", place=uri, mend="write it again") from error
    taken = sorted(columns & ours)
    if taken:
        raise DataError(f"the file has a column {taken[0]}", place=uri, mend="choose another name with `output`")
    index, row = _next(before)
    return [
        Unit(index + i, uri, first, min(size, total - first), row + first)
        for i, first in enumerate(range(0, total, size))
    ]


def _jsonl_units(uri: str, size: int, before: Sequence[Unit]) -> list[Unit]:
    index, row = _next(before)
    units: list[Unit] = []
    first = rows = start = at = 0
    for line in _lines(uri, 0, None):
        at += len(line)
        rows += bool(line.strip())
        if rows == size:
            units.append(Unit(index + len(units), uri, first, rows, row + first, start, at))
            first, rows, start = first + rows, 0, at
    if rows:
        units.append(Unit(index + len(units), uri, first, rows, row + first, start, at))
    return units


def _lines(uri: str, start: int, end: int | None) -> Iterator[bytes]:
    """Lines with their line feeds, of the bytes from `start` to `end` (a line's end, or the file's)."""
    fs, path = arrow_filesystem(uri)
    rest = b""
    with fs.open_input_file(path) as file:
        file.seek(start)
        left = (file.size() if end is None else end) - start
        while left > 0:
            block = file.read(min(_BLOCK, left))
            if not block:
                break
            left -= len(block)
            lines = (rest + block).split(b"\n")
            rest = lines.pop()
            yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def read_rows(unit: Unit) -> list[dict[str, Any] | str]:
    """The unit's rows: mappings, or for a line that is none a sentence that says why. Raises DataError."""
    if unit.parquet:
        return list(_table(unit).to_pylist())
    return [_row(line) for line in _lines(unit.uri, unit.start, unit.end) if line.strip()]


def _row(line: bytes) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except ValueError as error:  # bad JSON, or bytes that are not UTF-8
        return f"not JSON: {error}"
    return value if isinstance(value, dict) else "not a JSON object"


def _table(unit: Unit) -> pa.Table:
    """The unit's rows of its Parquet file, row groups outside it left unread."""
    import pyarrow.parquet as pq

    fs, path = arrow_filesystem(unit.uri)
    with pq.ParquetFile(path, filesystem=fs) as file:
        groups: list[int] = []
        begin = at = 0
        for i in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(i).num_rows
            if at + rows > unit.first and at < unit.first + unit.rows:
                begin = at if not groups else begin
                groups.append(i)
            at += rows
        table: pa.Table = file.read_row_groups(groups)
    return table.slice(unit.first - begin, unit.rows)


def write_part(unit: Unit, answers: Sequence[Answer], name: str, target: str, scored: bool = False) -> None:
    """Writes the unit's output file at once: every row of the input with its answer.

    Raises DataError when a JSONL row already has a field of ours.
    """
    if unit.parquet:
        _write_parquet(unit, answers, name, target, scored)
        return
    lines = []
    for row, answer in zip(read_rows(unit), answers, strict=True):
        added = answer.fields(name, scored)
        kept = row if isinstance(row, dict) else {}
        taken = sorted(kept.keys() & added.keys())
        if taken:
            raise DataError(f"a row has a field {taken[0]}", place=unit.uri, mend="choose another name with `output`")
        lines.append(json.dumps(kept | added, ensure_ascii=False))
    # A lone surrogate in the input is legal JSON and no UTF-8: keep it escaped.
    write_bytes(target, "".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"))


def _write_parquet(unit: Unit, answers: Sequence[Answer], name: str, target: str, scored: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = _table(unit)
    kinds = (pa.string(), pa.string(), pa.int64(), pa.int64(), pa.string(), pa.float64())
    types = dict(zip(Answer().fields(name, scored), kinds, strict=False))
    added = [answer.fields(name, scored) for answer in answers]
    for column, kind in types.items():
        table = table.append_column(column, pa.array([row[column] for row in added], kind))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_bytes(target, sink.getvalue().to_pybytes())


def dump(unit: Unit) -> str:
    """As JSON."""
    return json.dumps(asdict(unit))


def parse(text: str) -> Unit:
    """From :func:`dump`."""
    return Unit(**json.loads(text))
