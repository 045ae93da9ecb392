"""What people say about answers, as Parquet that preference training reads.

In a folder a row is first a line of a log, on disk before the caller is answered. A log is rolled to Parquet once it is
long or old enough, when the server stops, and at the next start if it was killed:

    preferences/*.parquet   corrected answers: prompt, chosen, rejected (and completion, label)
    opinions/*.parquet      answers with a thumb: prompt, completion, label
    ratings/*.parquet       thumbs for answers that were not sent along: nothing to train on
    log/*.jsonl             what is not rolled yet

On S3, where nothing can be appended to, every row is an object of Parquet at once.

    python -m modelyard.serving.feedback FOLDER         rolls what a killed server left
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from modelyard.serving.schema import FeedbackRequest
from modelyard.storage import is_remote, join, write_bytes

log = logging.getLogger(__name__)

ROWS = 1000
"""Rows of a log after which it is rolled."""
_TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
SCHEMA = pa.schema({
    "id": pa.string(), "time": pa.timestamp("s", "UTC"), "key": pa.string(), "version": pa.string(),
    "model": pa.string(), "response": pa.string(), "rating": pa.string(), "label": pa.bool_(), "prompt": _TURNS,
    "completion": pa.string(), "chosen": pa.string(), "rejected": pa.string(), "comment": pa.string(),
    "messages_json": pa.string(),
})  # fmt: skip


class FeedbackStore:
    """Keeps opinions. Several processes may keep theirs in one place.

    Args:
        place: folder or s3:// URI.
        roll_s: age in seconds at which a log becomes Parquet.
    """

    def __init__(self, place: str, roll_s: float = 60.0) -> None:
        self._place, self._roll_s = place, roll_s
        self._log = None if is_remote(place) else _Log(Path(place.removeprefix("file://")))
        self._timer: asyncio.Task[None] | None = None

    async def add(self, body: FeedbackRequest, holder: str, version: str) -> str:
        """Keeps one opinion and returns its id: it is on disk then.

        Raises StorageError or OSError when the place cannot be written, ValueError for images in a message.
        """
        name = uuid.uuid4().hex
        row = {"id": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), "key": holder,
               "version": body.version or version, **_row(body)}  # fmt: skip
        if self._log is None:
            await asyncio.to_thread(_write, self._place, f"{row['time'][:10]}-{name}", [row])
            return name
        await asyncio.to_thread(self._log.append, row)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().create_task(self._later())
        return name

    def close(self) -> None:
        """Rolls what is in the log."""
        if self._log is not None:
            self._log.roll()

    async def _later(self) -> None:
        await asyncio.sleep(self._roll_s)
        self._timer = None  # a row from here on starts another
        await asyncio.to_thread(self.close)


class _Log:
    """The log of one process: a file under a lock that ends with the process, so that others see whether it lives."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._guard = folder, threading.Lock()
        self._file: IO[bytes] | None = None
        self._rows = 0
        recover(folder)

    def append(self, row: Mapping[str, Any]) -> None:
        """Puts a row on disk. Raises OSError, with nothing written then."""
        line = (json.dumps(row) + "\n").encode()
        with self._guard:
            file = self._file or self._open()
            size = os.fstat(file.fileno()).st_size
            try:
                file.write(line)
                os.fsync(file.fileno())
            except OSError:  # a full disk may have taken half the line
                os.ftruncate(file.fileno(), size)
                raise
            self._rows += 1
            if self._rows >= ROWS:
                self._roll()

    def roll(self) -> None:
        """Turns the log to Parquet; the next row begins another."""
        with self._guard:
            self._roll()

    def _open(self) -> IO[bytes]:
        """A new log, after rolling those of processes that ended without."""
        logs = self._folder / "log"
        logs.mkdir(mode=0o700, parents=True, exist_ok=True)
        recover(self._folder)
        path = logs / f"{datetime.now(UTC):%Y-%m-%dT%H%M%S}-{uuid.uuid4().hex[:12]}.jsonl"
        hidden = path.with_suffix(".tmp")  # nobody may find it before it is locked
        opened = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._file, self._rows = os.fdopen(opened, "ab", buffering=0), 0
        fcntl.flock(opened, fcntl.LOCK_EX)
        hidden.rename(path)
        _sync(logs)
        self._path = path
        return self._file

    def _roll(self) -> None:
        if self._file is None:
            return
        file, self._file = self._file, None
        try:
            _to_parquet(self._folder, self._path)
        except (OSError, ValueError):
            log.exception("feedback stays in the log: %s", self._path)
        finally:
            file.close()


def recover(folder: Path) -> int:
    """Rolls the logs of processes that have ended, and returns how many rows that were."""
    rows = 0
    for path in sorted((folder / "log").glob("*.jsonl")):
        try:
            with path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                rows += _to_parquet(folder, path)
        except BlockingIOError:
            continue  # its process lives
        except FileNotFoundError:
            continue  # another was faster
        except (OSError, ValueError):
            log.exception("feedback stays in the log: %s", path)
    return rows


def _to_parquet(folder: Path, path: Path) -> int:
    """Writes a log's rows as Parquet, then removes it.

    The files have the log's name: what a crash between the two left is written over with the same rows.
    """
    lines = path.read_bytes().split(b"\n")[:-1]  # a last line without an end was never answered for
    rows = [json.loads(line) for line in lines]
    _write(str(folder), path.stem, rows)
    path.unlink()
    return len(rows)


def _write(place: str, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
    kinds: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        kinds[_kind(row)].append({**row, "time": datetime.fromisoformat(row["time"])})
    for kind, found in kinds.items():
        sink = pa.BufferOutputStream()
        if not is_remote(place):  # nobody else's business
            Path(place, kind).mkdir(mode=0o700, parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(found, SCHEMA), sink, compression="zstd")
        write_bytes(join(place, kind, f"{name}.parquet"), sink.getvalue().to_pybytes())


def _kind(row: Mapping[str, Any]) -> str:
    """What a row can teach."""
    if not row["prompt"] or not row["completion"] or any(turn["content"] is None for turn in row["prompt"]):
        return "ratings"
    return "preferences" if row["chosen"] is not None else "opinions"


def _row(body: FeedbackRequest) -> dict[str, Any]:
    turns = [m.plain() for m in body.messages] if body.messages else None
    more = any(turn.keys() - {"role", "content"} for turn in turns or ())
    return {
        "response": body.id, "model": body.model, "rating": body.rating, "label": body.rating == "up",
        "prompt": [{"role": t["role"], "content": t["content"]} for t in turns] if turns else None,
        "messages_json": json.dumps(turns) if more else None, "completion": body.answer, "chosen": body.correction,
        "rejected": body.answer if body.correction is not None else None, "comment": body.comment,
    }  # fmt: skip


def _sync(folder: Path) -> None:
    """Puts a folder's list of names on disk."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def main(arguments: list[str]) -> int:
    """Command line: `FOLDER`."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m modelyard.serving.feedback FOLDER\n")
        return 2
    sys.stdout.write(f"{recover(Path(arguments[0])):,} rows rolled\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
