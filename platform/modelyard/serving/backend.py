"""What the HTTP application needs from whatever computes: streams of step outputs, and statistics."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Protocol

from modelyard.engine.request import EngineStats, Request, StepOutput
from modelyard.serving.shelf import Shelf

if TYPE_CHECKING:
    from modelyard.engine.protocol import Engine


class Backend(Protocol):
    """Continues prompts somewhere."""

    def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Yields what is ready until an output with `finish`. Closing it early aborts the request.

        Raises ApiError (429, 503) when nothing can take the request.
        """
        ...

    async def stats(self) -> list[EngineStats]:
        """A snapshot of every engine. Raises TimeoutError when one is there and does not answer soon."""
        ...


class LocalBackend:
    """An engine in this process: the application without Ray, as benchmarks and notebooks use it.

    Args:
        engine: continues prompts.
        adapters: name -> folder of LoRA adapters it may load.
        most: adapters loaded at a time.
    """

    def __init__(self, engine: Engine, adapters: Mapping[str, str] | None = None, most: int = 8) -> None:
        self._engine, self._shelf = engine, Shelf(engine, adapters or {}, most)

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `Backend.stream`."""
        async with self._shelf.lent(request.adapter), aclosing(self._engine.submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def stats(self) -> list[EngineStats]:
        """See `Backend.stats`."""
        return [self._engine.stats()]
