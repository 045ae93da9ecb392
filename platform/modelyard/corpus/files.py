"""Parquet files that appear whole or not at all, on local disk or an object store."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.errors import StorageError
from modelyard.storage import arrow_filesystem, exists, filesystem, is_remote


class ParquetFile:
    """Collects tables into one Parquet file. Nothing is visible at `uri` before `close`.

    An object store gets the finished file by one upload; a local folder by rename. Without any rows no
    file is made, and one that an earlier try left is removed.
    """

    def __init__(self, uri: str, schema: Any = None) -> None:
        self.uri = uri
        self._schema = schema
        self._writer: Any = None
        self._path: Path | None = None

    def write(self, table: Any) -> None:
        """Appends a table. The first one sets the schema when none was given."""
        if not table.num_rows:
            return
        if self._writer is None:
            self._schema = self._schema or table.schema
            self._path = self._temporary()
            self._writer = pq.ParquetWriter(self._path, self._schema, compression="zstd", use_dictionary=False)
        self._writer.write_table(table.select(self._schema.names).cast(self._schema))

    def close(self) -> int:
        """Publishes the file and returns its size in bytes, 0 when there is none."""
        fs, path = filesystem(self.uri)
        if self._writer is None or self._path is None:
            if fs.exists(path):
                fs.rm(path)
            return 0
        self._writer.close()
        size = self._path.stat().st_size
        if is_remote(self.uri):
            fs.put_file(str(self._path), path)
            self._path.unlink()
        else:
            with self._path.open("rb") as handle:
                os.fsync(handle.fileno())
            self._path.replace(path)
        return size

    def _temporary(self) -> Path:
        if is_remote(self.uri):
            handle, name = tempfile.mkstemp(suffix=".parquet")
            os.close(handle)
            return Path(name)
        target = Path(filesystem(self.uri)[1])
        target.parent.mkdir(parents=True, exist_ok=True)
        return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def write_parquet(uri: str, table: Any) -> int:
    """Writes one table (also an empty one) and returns the file's size in bytes."""
    file = ParquetFile(uri, table.schema)
    if table.num_rows:
        file.write(table)
    return file.close()


def read_parquet(uri: str, rows: int, columns: list[str] | None = None) -> Iterator[Any]:
    """Tables of at most `rows` rows from one file; nothing when it does not exist.

    Raises:
        StorageError: the file is truncated or damaged.
    """
    if not exists(uri):
        return
    fs, path = arrow_filesystem(uri)
    try:
        with fs.open_input_file(path) as handle:
            file = pq.ParquetFile(handle)
            for batch in file.iter_batches(batch_size=rows, columns=columns):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise StorageError(
            f"an intermediate file is damaged: {error}", place=uri, mend="remove it and run again"
        ) from error
