"""Remote work: errors that workers raised on purpose reach the person as they were raised, and Ray Data is quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from modelyard.errors import ModelyardError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Raises the ModelyardError inside Ray's wrappers (task, user code) instead of the wrappers."""
    try:
        yield
    except Exception as error:  # Ray's wrappers share no base class with each other
        own = _own(error)
        if own is None:
            raise
        raise own from None


def quiet_ray_data() -> None:
    """Sets Ray Data up for stages of this process: our progress instead of its own, and the errors of our functions."""
    import logging

    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Otherwise a worker wraps what we raise, and pickling drops the original from the wrapper.
    context.raise_original_map_exception = True
    # It prints whole tracebacks of errors that are raised anyway; they stay in its log file.
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == "PlainRayHandler":
            handler.setLevel(logging.CRITICAL)


def blocks(items: int, workers: int) -> int:
    """Into how many tasks Ray Data should cut so many items of work for so many workers.

    A task takes up to four items, but every worker gets two tasks at least: Ray Data sees only every 0.1 s that a task
    has ended, and two workers of short tasks then were no faster than one.
    """
    return min(items, max(2 * workers, items // 4))


def _own(error: BaseException | None) -> ModelyardError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # A remote error is an instance of its cause's class, but holds Ray's text instead of what, place and mend.
        if isinstance(error, ModelyardError) and type(error).__module__ == "modelyard.errors":
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
