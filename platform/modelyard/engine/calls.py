"""Calls that another thread carries out between two steps of an engine."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future


def carry_out(action: Callable[[], None], future: Future[None]) -> None:
    """Runs `action` and tells the future's owner how it ended; not at all where that one has gone meanwhile."""
    if not future.set_running_or_notify_cancel():
        return  # answering it would raise here and end the engine
    try:
        action()
    except Exception as error:  # handed to the caller, whatever it is
        future.set_exception(error)
    else:
        future.set_result(None)
