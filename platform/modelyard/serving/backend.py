"""What the HTTP application needs from whatever computes: streams of step outputs, and statistics."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Protocol

from modelyard.engine.request import EngineStats, Request, StepOutput

if TYPE_CHECKING:
    from modelyard.engine.native import NativeEngine


class Backend(Protocol):
    """Continues prompts somewhere."""

    def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Yields what is ready until an output with `finish`. Closing it early aborts the request.

        Raises ApiError (429, 503) when nothing can take the request.
        """
        ...

    async def stats(self) -> list[EngineStats]:
        """A snapshot of every engine that answers."""
        ...


class LocalBackend:
    """An engine in this process: the application without Ray, as benchmarks and notebooks use it."""

    def __init__(self, engine: NativeEngine) -> None:
        self._engine = engine

    def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `Backend.stream`."""
        return self._engine.submit(request)

    async def stats(self) -> list[EngineStats]:
        """See `Backend.stats`."""
        return [self._engine.stats()]
