"""LoRA adapters an engine is lent: read when a request first names them, given back when others need room."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.errors import DataError, ModelyardError

if TYPE_CHECKING:
    from modelyard.engine.protocol import Engine

log = logging.getLogger(__name__)


class Shelf:
    """The adapters one engine may load. Belongs to one event loop.

    Args:
        engine: applies them.
        places: name -> folder or URI.
        most: adapters in memory at a time; those least recently used go first, but none that a request uses.
        fetch: from a place to a folder on this machine.
    """

    def __init__(
        self, engine: Engine, places: Mapping[str, str], most: int, fetch: Callable[[str], Path] = Path
    ) -> None:
        self._engine, self._places, self._most, self._fetch = engine, places, most, fetch
        self._loaded: dict[str, None] = {}  # in order of use
        self._users: Counter[str] = Counter()
        self._one_at_a_time = asyncio.Lock()

    @asynccontextmanager
    async def lent(self, name: str | None) -> AsyncIterator[None]:
        """Keeps adapter `name` loaded meanwhile; None = none is needed. Raises DataError when it cannot be loaded."""
        if name is None:
            yield
            return
        self._users[name] += 1
        try:
            async with self._one_at_a_time:
                if name not in self._loaded:
                    await self._load(name)
                self._loaded[name] = self._loaded.pop(name, None)
            yield
        finally:
            self._users[name] -= 1

    async def _load(self, name: str) -> None:
        while len(self._loaded) >= self._most:
            idle = next((n for n in self._loaded if not self._users[n]), None)
            if idle is None:
                break  # all are in use: one more for a while, rather than a request that waits for another's end
            await asyncio.to_thread(self._engine.unload_adapter, idle)
            del self._loaded[idle]
        try:
            folder = await asyncio.to_thread(self._fetch, self._places[name])
            await asyncio.to_thread(self._engine.load_adapter, name, str(folder))
        except (KeyError, OSError, ModelyardError) as error:
            log.error("adapter %s cannot be loaded: %s", name, error)  # its place is for the operator alone
            raise DataError(
                f"the adapter {name!r} cannot be loaded here", place="model", mend="ask who runs this server"
            ) from error
