"""What a stage sees of tracking: a run, and the events its calls become."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import psutil

from modelyard.tracking.redact import flatten, redact_text, safe_key

Event = dict[str, Any]
"""One JSON-able event: `event` names it, `time` is milliseconds since the epoch."""

ENDED = ("FINISHED", "FAILED", "KILLED")


class Run(Protocol):
    """One MLflow run. Every method may be called from any thread and returns at once."""

    @property
    def id(self) -> str | None:
        """The MLflow run id; None while MLflow has not been reached."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs options: nested mappings become dotted names, secrets are blanked."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers of one step (None = 0)."""

    def log_text(self, name: str, text: str) -> None:
        """Stores a small text as artifact file `name` (may contain folders: `plots/loss.csv`)."""

    def log_file(self, local_path: str | Path, name: str) -> None:
        """Stores a copy of a small local file as `name`; above 64 MiB only its path is recorded."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Sets tags; a later value replaces an earlier one."""

    def end(self, status: str = "FINISHED") -> None:
        """Ends the run: FINISHED, FAILED or KILLED."""


class EventRun:
    """Turns the calls of :class:`Run` into events; a subclass decides where they go."""

    def _emit(self, event: Event) -> None:
        raise NotImplementedError

    def log_params(self, params: Mapping[str, Any]) -> None:
        self._emit(event("params", values=flatten(params)))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        values = {safe_key(name): float(value) for name, value in metrics.items()}
        self._emit(event("metrics", step=int(step or 0), values=values))

    def log_text(self, name: str, text: str) -> None:
        self._emit(event("text", name=name, text=redact_text(text)))

    def log_file(self, local_path: str | Path, name: str) -> None:
        self._emit(event("file", name=name, path=str(Path(local_path).absolute())))

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        self._emit(event("tags", values=flatten(tags)))

    def end(self, status: str = "FINISHED") -> None:
        if status not in ENDED:
            raise ValueError(f"{status!r} is not one of {', '.join(ENDED)}")
        self._emit(event("end", status=status))


def event(kind: str, **fields: Any) -> Event:
    """An event of now."""
    return {"event": kind, "time": int(time.time() * 1000), **fields}


def start_event(experiment: str, name: str, **fields: Any) -> Event:
    """The first event of a run: enough to create it in MLflow now or at a later replay.

    `uid` is the run's identity before MLflow has given it an id, and is what makes replay exact.
    """
    return event("start", uid=uuid.uuid4().hex, experiment=experiment, name=name, owner=this_process(), **fields)


@cache
def this_process() -> str:
    """`host/pid/start time`: names this process for ever, even when its pid is used again."""
    pid = os.getpid()
    return f"{socket.gethostname()}/{pid}/{int(psutil.Process(pid).create_time())}"


def owner_alive(owner: str) -> bool | None:
    """Whether the process named by :func:`this_process` still runs; None when it is on another host."""
    try:
        host, pid, started = owner.rsplit("/", 2)
        if host != socket.gethostname():
            return None
        return abs(psutil.Process(int(pid)).create_time() - int(started)) < 2
    except (ValueError, psutil.NoSuchProcess):
        return False
