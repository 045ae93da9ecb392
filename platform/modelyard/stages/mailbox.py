"""The mailbox between training workers and the driver: in order, without waiting, remembering what a restart needs.

`ray.train.report` is not used for metrics: its queue holds one item and is drained once a health check, which would
cap training at one step in two seconds.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.train.metrics import StepMetrics

DRAIN_SECONDS = 0.5
"""How often the driver empties the mailbox, and how often a worker fills it at most."""
_LONGEST_WAIT = 60.0


Letter = tuple[str, bytes]
"""A kind and a pickled value: the mailbox hands it on unread, and so need not import what it is made of (3 CPU s)."""


def seal(kind: str, value: Any) -> Letter:
    """A message as it travels."""
    from ray import cloudpickle

    return kind, cloudpickle.dumps(value)


def unseal(letter: Letter) -> tuple[str, Any]:
    """Kind and value of a message that has travelled between processes of one run."""
    from ray import cloudpickle

    return letter[0], cloudpickle.loads(letter[1])


class Mailbox:
    """Messages from the workers to the driver, in order. Runs as a Ray actor without a CPU of its own."""

    def __init__(self) -> None:
        self._items: list[Letter] = []
        self._fatal = False
        self._groups: dict[str, float] = {}
        self._futile = 0

    def push(self, items: list[Letter]) -> None:
        """Takes messages in."""
        for kind, _ in items:
            self._fatal |= kind == "error"
            # A worker group that has made a step was no futile start.
            self._futile = 0 if kind == "metrics" else self._futile
        self._items += items

    def drain(self) -> list[Letter]:
        """Hands all messages out and forgets them."""
        items, self._items = self._items, []
        return items

    def enter(self, group: str, backoff: float) -> float | None:
        """Called by every worker of a new group; seconds to wait before work, or None: an error came that no
        restart mends.

        The wait doubles with every group that ended without a single step; all workers of one group get the same.
        """
        if self._fatal:
            return None
        if group not in self._groups:
            wait = backoff * 2 ** (self._futile - 1) if self._groups and self._futile else 0.0
            self._groups[group], self._futile = min(wait, _LONGEST_WAIT), self._futile + 1
            self._items.append(seal("group", (len(self._groups), self._groups[group])))
        return self._groups[group]


class Outbox:
    """A worker's end: collects messages and pushes them without waiting, at most twice a second. Thread-safe."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._items, self._last = mailbox, list[Letter](), 0.0
        self._lock = threading.Lock()

    def metrics(self, metrics: StepMetrics) -> None:
        """Sends one step's metrics."""
        self.send("metrics", metrics)

    def say(self, text: str) -> None:
        """Sends a line for people, at once: it may be this worker's last."""
        self.send("say", text, now=True)

    def send(self, kind: str, value: Any, now: bool = False, wait: bool = False) -> None:
        """Sends anything picklable, `now` or half a second after the last; with `wait` returns when it has arrived."""
        import ray

        with self._lock:
            self._items.append(seal(kind, value))
            if not (now or wait) and time.monotonic() - self._last < DRAIN_SECONDS:
                return
            items, self._items, self._last = self._items, [], time.monotonic()
        arrived = self._mailbox.push.remote(items)
        if wait:
            ray.get(arrived)
