"""One run of this process: buffered, sent in batches, spooled while MLflow is away."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.tracking.run import Event, EventRun
from modelyard.tracking.sink import KIND, STAGE
from modelyard.tracking.spool import Spool
from modelyard.tracking.store import Refused, Unreachable

if TYPE_CHECKING:
    from modelyard.tracking.tracker import Tracker

log = logging.getLogger("modelyard.tracking")


class LiveRun(EventRun):
    """A run whose events go to the tracker's store, or to a spool while that is away."""

    def __init__(self, tracker: Tracker, first: list[Event], spool: Path) -> None:
        self._tracker, self.start, self._spool = tracker, first[0], Spool(spool)
        self._buffer: list[Event] = list(first)
        self._buffer_lock, self._send_lock = threading.Lock(), threading.RLock()
        self._id: str | None = None
        self._refused = False
        tags = self.start.get("tags", {})
        self._stage, self._kind = str(tags.get(STAGE, "")), str(tags.get(KIND, ""))
        self.ended = False

    @property
    def id(self) -> str | None:
        """The MLflow run id; None while MLflow has not been reached."""
        return self._id

    @property
    def uid(self) -> str:
        """The run's identity before MLflow gave it an id."""
        return str(self.start["uid"])

    def end(self, status: str = "FINISHED") -> None:
        if self.ended:
            return
        super().end(status)
        self.ended = True
        self.flush()
        if self._tracker.exporter and self._stage:
            self._tracker.exporter.forget(self._tracker.recipe, self._stage)

    @property
    def done(self) -> bool:
        """Whether the run has ended and everything of it is in MLflow."""
        return self.ended and not self._buffer and not self._spool.path.exists()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics, step)
        if self._tracker.exporter:
            self._tracker.exporter.observe(self._tracker.recipe, self._stage, self._kind, metrics, step)

    def log_file(self, local_path: str | Path, name: str) -> None:
        super().log_file(local_path, name)
        self.flush()  # at once: the caller may delete the file next

    def _emit(self, event: Event) -> None:
        with self._buffer_lock:
            self._buffer.append(event)

    def flush(self) -> None:
        """Sends what is buffered; spools it when MLflow is away or refuses it."""
        with self._send_lock:
            with self._buffer_lock:
                events, self._buffer = self._buffer, []
            spooled = self._spool.path.exists()
            if not events and not (spooled and self._tracker.online and not self._refused):
                return
            self._send(events, self._spool.read() if spooled else [])

    def _send(self, events: list[Event], earlier: list[Event]) -> None:
        if not self._tracker.online or self._refused:
            self._keep(events, earlier)
            return
        try:
            self._id = self._tracker.apply(self._id, earlier + events)
        except Unreachable as error:
            self._keep(events, earlier)
            self._tracker.lost(error)
        except Refused as error:
            self._refused = True
            self._keep(events, earlier)
            log.warning("MLflow refused events, kept in %s: %s", self._spool.folder, error)
        else:
            self._spool.discard()

    def _keep(self, events: list[Event], earlier: list[Event]) -> None:
        if not earlier and events[:1] != [self.start]:
            # A replay in another process must find this run: by its id when it has one.
            self._spool.append([{**self.start, "existing": self._id or self.start.get("existing")}])
        self._spool.append(events)

    def beat(self) -> None:
        """Tells the store that this process is alive."""
        with self._send_lock:
            if self._id is not None and not self.ended:
                self._tracker.beat(self._id)
