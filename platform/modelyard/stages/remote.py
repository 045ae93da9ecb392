"""Errors of remote work: what a worker raised on purpose reaches the person as it was raised."""

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


def _own(error: BaseException | None) -> ModelyardError | None:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        # A remote error is an instance of its cause's class, but holds Ray's text instead of what, place and mend.
        if isinstance(error, ModelyardError) and type(error).__module__ == "modelyard.errors":
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
