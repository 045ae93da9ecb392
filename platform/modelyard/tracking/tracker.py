"""Runs that write to MLflow from a background thread, and to disk while MLflow is away."""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from modelyard.errors import StorageError
from modelyard.monitor.exporter import from_environment
from modelyard.storage import InputEntry
from modelyard.tracking.live import LiveRun
from modelyard.tracking.recover import Orphan, recover
from modelyard.tracking.redact import flatten
from modelyard.tracking.run import Event, Run, event, start_event
from modelyard.tracking.sink import FINGERPRINT, KIND, RECIPE, STAGE, Sink
from modelyard.tracking.spool import replay_all
from modelyard.tracking.store import Refused, Unreachable, connect, find_store

FLUSH_S = 2.0
RETRY_S = 15.0
BEAT_S = 60.0

log = logging.getLogger("modelyard.tracking")


class Tracker:
    """All runs of one root.

    Args:
        root: the recipe's root, local or s3://.
        recipe: the recipe's name, which is the MLflow experiment.
        uri: MLflow tracking URI; default `MLFLOW_TRACKING_URI`, else SQLite and a folder under the root.
        spool: folder for events that MLflow could not take; default beside the embedded store.
        say: where one-line notices for people go; default the log.

    Nothing is raised when MLflow cannot be reached: one warning, and events wait on disk. They are
    replayed when it is back, within this process (tried every 15 s) or at the next start. With
    `MODELYARD_METRICS_PORT` set, what stages log is shown to Prometheus too.

    Raises:
        ResourceError: the port that `MODELYARD_METRICS_PORT` names is in use.
    """

    def __init__(
        self,
        root: str,
        recipe: str,
        uri: str | None = None,
        *,
        spool: Path | str | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.root, self.recipe, self.store = root, recipe, find_store(root, uri)
        self.spool = Path(spool) if spool else self.store.folder / "spool"
        self._say = say or log.warning
        self.exporter = from_environment()
        self._sink: Sink | None = None
        self._runs: list[LiveRun] = []
        self._orphans: list[Orphan] = []
        self._lock = threading.RLock()
        self._next_try = 0.0
        self._warned = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="modelyard-tracking", daemon=True)
        if self.store.note:
            self._say(self.store.note)
        self._connect()
        self._thread.start()
        atexit.register(self.close)

    @property
    def online(self) -> bool:
        """Whether MLflow answered last time."""
        return self._sink is not None

    def start_recipe(self, params: Mapping[str, Any], tags: Mapping[str, Any], fingerprint: str) -> Run:
        """The parent run of one execution of the recipe.

        A run of the same fingerprint that a killed process left open is resumed; others it left open
        are marked KILLED.
        """
        orphan = self._recover(fingerprint)
        labels = {RECIPE: self.recipe, FINGERPRINT: fingerprint, **flatten(tags)}
        first = start_event(self.recipe, self.recipe, tags=labels, existing=orphan.run_id if orphan else None)
        return self._begin([first, event("params", values=flatten(params))])

    def start_stage(
        self,
        parent: Run,
        stage: str,
        kind: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, InputEntry],
        fingerprint: str,
        existing_run_id: str | None = None,
    ) -> Run:
        """A stage's run, nested in its recipe's.

        Args:
            parent: what :meth:`start_recipe` gave.
            stage: the stage's name in the recipe.
            kind: the stage's kind.
            params: the stage's options.
            inputs: as in the manifest; becomes the run's dataset lineage.
            fingerprint: the stage's fingerprint.
            existing_run_id: run of an earlier try, to be continued. Without it, a run of the same stage
                and fingerprint that a killed process left under the same parent is continued.
        """
        existing = existing_run_id or self._orphan_stage(stage, fingerprint)
        labels = {RECIPE: self.recipe, STAGE: stage, KIND: kind, FINGERPRINT: fingerprint}
        labels |= {f"modelyard.input.{name}": _origin(entry) for name, entry in inputs.items()}
        first = start_event(
            self.recipe, stage, tags=flatten(labels), existing=existing,
            parent_id=parent.id, parent_uid=getattr(parent, "uid", None),
        )  # fmt: skip
        events = [first, event("params", values=flatten(params))]
        if inputs:
            events.append(event("inputs", values=[_dataset(name, entry) for name, entry in inputs.items()]))
        return self._begin(events)

    def apply(self, run_id: str | None, events: list[Event]) -> str:
        """Sends events to MLflow. Raises Unreachable or Refused (both StorageError)."""
        sink = self._sink
        if sink is None:
            raise Unreachable("MLflow is not reached", place=self.store.uri, mend="start it and run again")
        return sink.apply(run_id, events)

    def beat(self, run_id: str) -> None:
        """Marks a run as written by a living process."""
        sink = self._sink
        if sink is None:
            return
        try:
            sink.beat(run_id, int(time.time() * 1000))
        except Unreachable as error:
            self.lost(error)
        except Refused as error:
            log.warning("%s", error)

    def lost(self, error: StorageError) -> None:
        """MLflow went away: warn once, spool from now on, try again in a while."""
        with self._lock:
            self._sink = None
            self._next_try = time.monotonic() + RETRY_S
            if not self._warned:
                self._warned = True
                self._say(f"MLflow at {self.store.uri} is away ({error.what}); events wait in {self.spool}")

    def flush(self) -> None:
        """Sends what all runs have buffered, parents first."""
        with self._lock:
            runs = list(self._runs)
        for run in runs:
            run.flush()
        with self._lock:
            self._runs = [run for run in self._runs if not run.done]

    def close(self) -> None:
        """Ends what is still open as KILLED, flushes and stops the background thread."""
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(timeout=30)
        for run in reversed(self._runs):
            run.end("KILLED")
        self.flush()
        self._close_orphans()
        if self.exporter:
            self.exporter.close()
        atexit.unregister(self.close)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _connect(self) -> None:
        try:
            self._sink = Sink(connect(self.store), self.store)
            count = replay_all(self.spool, self)
        except StorageError as error:
            self.lost(error) if isinstance(error, Unreachable) else log.warning("cannot replay: %s", error)
            return
        if self._warned or count:
            self._say(f"MLflow at {self.store.uri} is reached; {count} spooled runs of earlier starts were replayed")
        self._warned = False

    def _begin(self, first: list[Event]) -> LiveRun:
        start = first[0]
        run = LiveRun(self, first, self.spool / f"{start['time']}-{start['uid'][:8]}")
        with self._lock:
            self._runs.append(run)
        run.flush()
        return run

    def _recover(self, fingerprint: str) -> Orphan | None:
        sink = self._sink
        if sink is None:
            return None
        try:
            found = recover(sink, self.recipe, fingerprint)
        except Unreachable as error:
            self.lost(error)
            return None
        if found:
            self._orphans.append(found)
        return found

    def _orphan_stage(self, stage: str, fingerprint: str) -> str | None:
        key = (stage, fingerprint)
        return next((orphan.stages.pop(key) for orphan in self._orphans if key in orphan.stages), None)

    def _close_orphans(self) -> None:
        """Stages of a resumed recipe run that this execution did not continue."""
        left = [run_id for orphan in self._orphans for run_id in orphan.stages.values()]
        try:
            for run_id in left:
                self.apply(run_id, [event("end", status="KILLED")])
        except StorageError as error:
            log.warning("cannot close runs that an earlier process left open: %s", error.what)

    def _work(self) -> None:
        last_beat = time.monotonic()
        while not self._stop.wait(FLUSH_S):
            if self._sink is None and time.monotonic() > self._next_try:
                self._connect()
            self.flush()
            if time.monotonic() - last_beat > BEAT_S:
                last_beat = time.monotonic()
                with self._lock:
                    runs = list(self._runs)
                for run in runs:
                    run.beat()


def _origin(entry: InputEntry) -> str:
    return f"{entry.stage or entry.uri or 'files'}@{entry.fingerprint[:12]}"


def _dataset(name: str, entry: InputEntry) -> dict[str, Any]:
    return {
        "name": entry.stage or name,
        "digest": entry.fingerprint,
        "uri": entry.uri or "",
        "context": name,
        "profile": {"files": entry.files, "bytes": entry.bytes, "fingerprint": entry.fingerprint},
    }
