"""An engine that steps by itself, for a caller that wants to step it: a rollout pool, a reference that scores."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.engine.checkpoint import read_end_tokens, read_json
from modelyard.engine.options import EngineOptions
from modelyard.engine.protocol import Engine
from modelyard.engine.request import Request, StepOutput

if TYPE_CHECKING:
    from torch import Tensor

    from modelyard.engine.tokenizer import Tokenizer


class Stepped:
    """Implements `protocol.Stepper` by any `protocol.Engine`: a step is what has come since the last, and waits for it.

    Requests get ids of their own in the engine, so that one may be asked again at once under the name of one that was
    aborted.

    Args:
        engine: continues prompts; closed with this.
        folder: the model's.
        options: the engine's.
    """

    def __init__(self, engine: Engine, folder: str | Path, options: EngineOptions) -> None:
        self._engine, self.options = engine, options
        self.end_tokens = read_end_tokens(Path(folder), read_json(Path(folder) / "config.json"))
        self._outputs: queue.SimpleQueue[tuple[str, StepOutput]] = queue.SimpleQueue()
        self._names: dict[str, str] = {}
        self._inside: dict[str, str] = {}
        self._count = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stepped", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """See `protocol.Stepper`."""
        return self._engine.tokenizer

    @property
    def max_length(self) -> int:
        """See `protocol.Stepper`."""
        return self._engine.max_length

    @property
    def version(self) -> int:
        """See `protocol.Stepper`."""
        return self._engine.stats().weights

    @property
    def paused(self) -> bool:
        """See `protocol.Stepper`."""
        return self._engine.stats().paused

    @property
    def waiting(self) -> int:
        """Requests beyond those that fit into a step."""
        return max(0, len(self._inside) - self.options.max_sequences)

    @property
    def busy(self) -> bool:
        """See `protocol.Stepper`."""
        return bool(self._inside) and not self.paused

    def add(self, request: Request) -> None:
        """See `protocol.Stepper`."""
        inside = f"{request.id}#{next(self._count)}"
        start = self._engine.start(replace(request, id=inside), partial(self._put, inside))
        self._names[inside], self._inside[request.id] = request.id, inside
        try:
            asyncio.run_coroutine_threadsafe(start, self._loop).result()
        except BaseException:
            self._forget(inside)
            raise

    def abort(self, request_id: str) -> None:
        """See `protocol.Stepper`."""
        inside = self._inside.get(request_id)
        if inside is not None:
            self._forget(inside)
            self._engine.abort(inside)

    def step(self) -> list[tuple[str, StepOutput]]:
        """See `protocol.Stepper`."""
        found: dict[str, StepOutput] = {}
        while self.busy and not found:
            for inside, output in self._arrived():
                name = self._names.get(inside)
                if name is None:
                    continue  # aborted since
                found[name] = found[name] + output if name in found else output
                if output.finish is not None:
                    self._forget(inside)
        return list(found.items())

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`."""
        self._engine.update_weights(weights, version)

    def close(self) -> None:
        """See `protocol.Stepper`."""
        self._engine.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _put(self, inside: str, output: StepOutput) -> None:
        self._outputs.put((inside, output))

    def _arrived(self) -> list[tuple[str, StepOutput]]:
        """What has come; waits for the first."""
        found = [self._outputs.get()]
        while not self._outputs.empty():
            found.append(self._outputs.get())
        return found

    def _forget(self, inside: str) -> None:
        name = self._names.pop(inside)
        if self._inside.get(name) == inside:
            del self._inside[name]
