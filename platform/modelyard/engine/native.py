"""The engine behind an asynchronous interface: one thread steps, any number of event loops listen."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.engine.calls import carry_out
from modelyard.engine.core import EngineCore
from modelyard.engine.options import EngineOptions
from modelyard.engine.protocol import Put
from modelyard.engine.request import EngineStats, EngineStopped, Request, StepOutput, Task
from modelyard.engine.tasks import Streams
from modelyard.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)


class NativeEngine(Streams):
    """Implements `protocol.Engine` for one model in this process.

    Args:
        folder: a Hugging Face model folder.
        options: sizes, budget, precision.
    """

    def __init__(self, folder: str | Path, options: EngineOptions | None = None) -> None:
        self._core = EngineCore(folder, options)
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._readers: dict[str, tuple[asyncio.AbstractEventLoop, Put]] = {}
        self._closed = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        return self._core.config.vocabulary

    @property
    def max_length(self) -> int:
        """Tokens a prompt and its answer may have together."""
        return self._core.max_length

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when its folder has none."""
        return self._core.tokenizer

    @property
    def tasks(self) -> frozenset[Task]:
        """What requests may ask for."""
        return frozenset({"generate", "score", "embed"})

    @property
    def alive(self) -> bool:
        """Whether the step thread runs."""
        return self._thread.is_alive()

    async def start(self, request: Request, put: Put) -> None:
        """See `protocol.Engine.start`."""
        loop = asyncio.get_running_loop()
        # A grammar may take a second to compile, in which the other requests would stand still.
        matcher = await asyncio.to_thread(self._core.compile, request) if request.sampling.grammar else None

        def add() -> None:
            self._core.add(request, matcher)
            self._readers[request.id] = loop, put

        try:
            await asyncio.wrap_future(self._call(add))
        except asyncio.CancelledError:
            self.abort(request.id)  # it may have been taken in already
            raise

    def abort(self, request_id: str) -> None:
        """See `protocol.Engine.abort`."""

        def run() -> None:
            output = self._core.abort(request_id)
            if output is not None:
                self._deliver([(request_id, output)])

        if not self._closed:
            self._call(run)

    def stats(self) -> EngineStats:
        """See `protocol.Engine.stats`."""
        return self._core.stats()

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`. Blocks until the step in progress has ended."""
        self._call(lambda: self._core.update_weights(weights, version)).result()

    def pause(self) -> None:
        """See `protocol.Engine.pause`. Blocks until the step in progress has ended."""
        self._call(lambda: setattr(self._core, "paused", True)).result()

    def resume(self) -> None:
        """See `protocol.Engine.resume`."""
        self._call(lambda: setattr(self._core, "paused", False)).result()

    def load_adapter(self, name: str, folder: str) -> None:
        """See `protocol.Engine.load_adapter`. Reads in the caller's thread while the engine goes on."""
        adapter = self._core.read_adapter(name, folder)
        self._call(lambda: self._core.add_adapter(adapter)).result()

    def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        self._call(lambda: self._core.unload_adapter(name)).result()

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping, checked between two steps; an empty list when nothing is."""
        found: list[str] = []
        self._call(lambda: found.extend(self._core.invariants())).result()
        return found

    def close(self) -> None:
        """See `protocol.Engine.close`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _call(self, action: Callable[[], None]) -> Future[None]:
        """Runs `action` in the step thread, between two steps. Raises EngineStopped when the engine is closed."""
        future: Future[None] = Future()
        with self._wake:
            if self._closed or not self._thread.is_alive():
                raise EngineStopped(self._failure or "the engine is closed", place="engine", mend="start a new one")
            self._commands.append(lambda: carry_out(action, future))
            self._wake.notify()
        return future

    def _run(self) -> None:
        try:
            while self._next_commands():
                outputs = self._core.step()
                if outputs:
                    self._deliver(outputs)
        except Exception as error:
            # The loop cannot go on with a cache in an unknown state: fail all requests, refuse new ones.
            log.exception("the engine's step failed")
            self._failure = f"the engine failed: {error}"
        finally:
            self._shut()

    def _next_commands(self) -> bool:
        """Runs what callers asked for; waits when there is nothing to compute. False when closed."""
        with self._wake:
            while not self._closed and not self._commands and not self._core.busy:
                self._wake.wait()
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        return not self._closed

    def _shut(self) -> None:
        with self._wake:
            self._closed = True
            commands, self._commands = self._commands, []
        for command in commands:
            command()
        finish = (
            StepOutput((), finish="error", error=self._failure) if self._failure else StepOutput((), finish="abort")
        )
        self._deliver([(name, finish) for name in list(self._readers)])
        self._core.close()

    def _deliver(self, outputs: Iterable[tuple[str, StepOutput]]) -> None:
        """One wake-up of each listening loop a step, whatever the number of requests."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Put, StepOutput]]] = {}
        for name, output in outputs:
            reader = self._readers.pop(name, None) if output.finish is not None else self._readers.get(name)
            if reader is not None:
                by_loop.setdefault(reader[0], []).append((reader[1], output))
        for loop, items in by_loop.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_put_all, items)


def _put_all(items: list[tuple[Put, StepOutput]]) -> None:
    for put, output in items:
        put(output)
