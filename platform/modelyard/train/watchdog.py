"""A watch over steps: one that takes too long has its stacks written down, and the worker ends so that it can restart.

In a process group one worker that hangs makes all others wait inside a collective, where no exception reaches them:
every worker watches itself, and all of them end at about the same time.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress

from modelyard import storage
from modelyard.errors import StorageError
from modelyard.train.hooks import Hooks
from modelyard.train.metrics import Say, no_say

HUNG = 86
"""Exit code of a worker that the watchdog ended."""
_FIRST = 4.0
"""The first step may take this many times longer: it compiles, and fills caches."""
_GRACE = 5.0
"""Seconds between the dump and the end, in which the other workers dump too."""


class Watchdog(Hooks):
    """Ends the process when a step takes longer than `timeout` seconds.

    Args:
        timeout: seconds.
        rank: of this worker.
        reports: URI of a folder for the stacks; None = standard error only.
        say: takes the news. Called from the watching thread.
        end: what to do after the dump; ends the process by default.
    """

    def __init__(
        self,
        timeout: float,
        rank: int,
        reports: str | None = None,
        say: Say = no_say,
        end: Callable[[], None] = lambda: os._exit(HUNG),
    ) -> None:
        self._timeout, self._rank, self._reports, self._say, self._end = timeout, rank, reports, say, end
        self._step, self._deadline, self._closed = 0, float("inf"), threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, step: int, steps: int) -> None:
        first, self._step = self._thread is None, step
        self._deadline = time.monotonic() + self._timeout * (_FIRST if first else 1.0)
        if first:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self) -> None:
        self._deadline = time.monotonic() + self._timeout

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(10)

    def _watch(self) -> None:
        try:
            self._wait()
        finally:
            faulthandler.cancel_dump_traceback_later()

    def _wait(self) -> None:
        while not self._closed.is_set():
            left = self._deadline - time.monotonic()
            if left <= 0:
                self._fire()
                return
            with suppress(ValueError, OSError, AttributeError):
                # Ours cannot run while C code holds the interpreter lock; this one can. It ends the process.
                faulthandler.dump_traceback_later(self._timeout + 60, exit=True, file=sys.__stderr__ or 2)
            self._closed.wait(min(left, self._timeout / 4, 15.0))

    def _fire(self) -> None:
        text = stacks()
        print(f"worker {self._rank}, step {self._step + 1}:\n{text}", file=sys.stderr, flush=True)
        where = "standard error"
        if self._reports is not None:
            where = storage.join(self._reports, "hangs", f"step-{self._step + 1}-rank-{self._rank}.txt")
            with suppress(StorageError, OSError):
                storage.write_bytes(where, text.encode())
        self._say(
            f"step {self._step + 1} took longer than {self._timeout:g} s on worker {self._rank}: stacks in {where}"
        )
        self._closed.wait(min(_GRACE, self._timeout))
        self._end()


def stacks() -> str:
    """The Python stacks of all threads of this process, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main = threading.main_thread().ident
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    parts = [f"{names.get(ident, ident)}\n{''.join(traceback.format_stack(frame))}" for ident, frame in frames]
    return "\n".join(parts)
