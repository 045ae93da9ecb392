"""Events on disk: what a run becomes when MLflow cannot be reached, and how it is replayed.

A spool is a folder with `events.jsonl` (one event a line, the first is `start`) and `files/`. Replay is
exact because every event is idempotent in MLflow: a run is found again by its uid, a metric with the
same key, value, step and time is stored once, parameters and tags overwrite themselves.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.tracking.run import Event, EventRun, owner_alive, start_event

if TYPE_CHECKING:
    from modelyard.tracking.tracker import Tracker

_EVENTS = "events.jsonl"
STALE_S = 600.0
"""Seconds without a sign of life after which a process on another host counts as dead."""


class Spool:
    """One run's events in a folder. `append` is atomic towards other threads and processes."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / _EVENTS

    def append(self, events: Iterable[Event]) -> None:
        """Adds events; files are copied into the spool, for the original may be gone at replay."""
        lines = [json.dumps(self._keep(e), ensure_ascii=False) + "\n" for e in events]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if handle.tell() and not _ends_with_newline(self.path):
                lines.insert(0, "\n")  # a torn line of a killed process must not swallow the next
            handle.write("".join(lines).encode())

    def _keep(self, item: Event) -> Event:
        if item["event"] != "file" or Path(item["path"]).is_relative_to(self.folder):
            return item
        files = self.folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        target = files / f"{len(list(files.iterdir())):04d}-{Path(item['path']).name}"
        shutil.copyfile(item["path"], target)
        return {**item, "path": str(target)}

    def read(self) -> list[Event]:
        """All whole events; a line torn by a kill is skipped."""
        return list(_parse(self.path.read_bytes())) if self.path.exists() else []

    def start(self) -> Event | None:
        """The `start` event, or None when the spool is empty or damaged."""
        events = self.read()
        return events[0] if events and events[0]["event"] == "start" else None

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        """Held while a spool is replayed: yields False when another process is at it."""
        lock = self.folder.with_name(self.folder.name + ".lock")
        if not self.folder.exists():
            yield False
            return
        with lock.open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield self.folder.exists()
            lock.unlink(missing_ok=True)

    def discard(self) -> None:
        """Removes the spool: everything in it is in MLflow."""
        shutil.rmtree(self.folder, ignore_errors=True)


class SpoolRun(EventRun):
    """A run that only writes events to a local folder. It needs no MLflow, so tests of stages use it.

    Args:
        path: the folder; a second SpoolRun on it continues the same run.
        name: run name that a replay gives it; default the folder's name.
        experiment: experiment that a replay puts it in.
    """

    def __init__(self, path: Path | str, name: str | None = None, experiment: str = "spooled") -> None:
        self._spool = Spool(path)
        self._lock = threading.Lock()
        if self._spool.start() is None:
            self._emit(start_event(experiment, name or self._spool.folder.name))

    @property
    def id(self) -> str | None:
        """Always None: no MLflow run exists yet."""
        return None

    def _emit(self, event: Event) -> None:
        with self._lock:
            self._spool.append([event])


def read_events(path: Path | str) -> list[Event]:
    """The events of a spool folder, oldest first."""
    return Spool(path).read()


def replay(path: Path | str, tracker: Tracker) -> str | None:
    """Sends one spool to MLflow and removes it; a spool that is gone or damaged is nothing to do.

    Returns:
        The MLflow run id, or None when there was nothing to replay.

    Raises:
        StorageError: MLflow cannot be reached or refuses the events; the spool stays.
    """
    spool = Spool(path)
    with spool.exclusive() as mine:
        if not mine or spool.start() is None:
            return None
        run_id = tracker.apply(None, spool.read())
        spool.discard()
        return run_id


def replay_all(folder: Path, tracker: Tracker) -> int:
    """Replays every spool below `folder` that nobody writes any more, oldest first. Returns how many.

    Raises:
        StorageError: MLflow cannot be reached or refuses the events; the spool stays.
    """
    done = [path for path in sorted(folder.glob("*")) if path.is_dir() and _finished(Spool(path).read())]
    return sum(replay(path, tracker) is not None for path in done)


def _finished(events: list[Event]) -> bool:
    if not events or events[0]["event"] != "start":
        return False
    if events[-1]["event"] == "end":
        return True
    alive = owner_alive(events[0]["owner"])
    return not alive if alive is not None else time.time() - events[-1]["time"] / 1000 > STALE_S


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if isinstance(item, dict) and "event" in item:
            yield item


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as handle:
        handle.seek(-1, 2)
        return handle.read(1) == b"\n"
