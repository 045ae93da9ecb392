"""The Ray actor of a rollout engine: a pool of one engine that steps in a thread, whoever waits for it."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.engine.calls import carry_out
from modelyard.errors import StageError
from modelyard.stages.train_worker import Place, bring

if TYPE_CHECKING:
    import torch

    from modelyard.align.environment import Telling
    from modelyard.align.options import RolloutEngine
    from modelyard.align.pool import Ask, LocalPool
    from modelyard.align.samples import Drawn
    from modelyard.align.weights import Change, Weights

Packed = list[tuple[str, list[tuple[Any, str]], bool | None]]
"""Of each tensor its name, its arrays with their torch types, and for a `Change`, which has several, whether its matrix
is in four bits: arrays cross the object store without a copy, tensors do not."""


def packed(weights: Weights) -> Packed:
    """Weights as they travel."""
    from modelyard.align.weights import Change

    found: Packed = []
    for name, value in weights:
        parts = value.parts if isinstance(value, Change) else (value,)
        found.append((name, [_array(part) for part in parts], value.quantized if isinstance(value, Change) else None))
    return found


def unpacked(weights: Packed) -> Iterator[tuple[str, torch.Tensor | Change]]:
    """The weights again; their tensors are views of the object store, to be read only."""
    from modelyard.align.weights import Change

    for name, arrays, quantized in weights:
        parts = tuple(_tensor(*each) for each in arrays)
        yield name, parts[0] if quantized is None else Change(parts, quantized)


def packed_bytes(weights: Packed) -> int:
    """What they take in the object store."""
    return sum(array.nbytes for _, arrays, _ in weights for array, _ in arrays)


def _array(tensor: torch.Tensor) -> tuple[Any, str]:
    import torch

    whole = tensor.detach().cpu().contiguous()
    array = whole.view(torch.int16) if whole.dtype == torch.bfloat16 else whole  # NumPy has no bfloat16
    return array.numpy(), str(whole.dtype).removeprefix("torch.")


def _tensor(array: Any, kind: str) -> torch.Tensor:
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(getattr(torch, kind))


class RolloutActor:
    """One engine, which answers while it takes calls.

    Every call names a session. A new one (another trainer, or the same one that has given up waiting) drops what was
    asked in the last.

    Args:
        model: the model's folder.
    """

    def __init__(self, model: Place) -> None:
        self._model = model
        self._session, self._settings = "", tuple[Any, ...]()
        self._pool: LocalPool | None = None
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: dict[str, Future[list[Drawn]]] = {}
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    async def begin(
        self, session: str, settings: RolloutEngine, telling: Telling | None, version: int, weights: Packed | None
    ) -> None:
        """Builds the engine unless there is one of these settings, forgets what was asked, and takes `weights`.

        Raises:
            DataError, ResourceError: as `engine.choose.start`.
            StorageError: the model cannot be brought here.
            RecipeError: the environment cannot be imported here.
        """
        await self._call(lambda: self._begin(session, settings, telling, version, weights))

    async def update(self, session: str, version: int, weights: Packed) -> None:
        """Puts weights in the place of those by these names, between two steps."""
        await self._call(lambda: self._update(session, version, weights))

    async def answer(self, session: str, ask: Ask) -> list[Drawn]:
        """The answers to a prompt.

        Raises:
            DataError: the engine cannot take the prompt, or has failed.
            StageError: another session has begun.
        """
        done: Future[list[Drawn]] = Future()
        await self._call(lambda: self._ask(session, ask, done))
        return await asyncio.wrap_future(done)

    def _begin(
        self, session: str, settings: RolloutEngine, telling: Telling | None, version: int, weights: Packed | None
    ) -> None:
        from modelyard.align.pool import LocalPool
        from modelyard.engine.choose import stepper

        self._abandon(StageError("another session has begun", place="rollouts.engines"))
        if self._pool is None or (settings, telling) != self._settings:
            if self._pool is not None:
                self._pool.close()
            self._pool = None
            model = Path(str(bring(self._model)))
            self._pool = LocalPool([stepper(model, settings)], model, telling=telling)
            self._settings = settings, telling
        self._session = session
        if weights is not None:
            self._update(session, version, weights)

    def _update(self, session: str, version: int, weights: Packed) -> None:
        self._check(session)
        assert self._pool is not None
        self._pool.update_weights(unpacked(weights), version)

    def _ask(self, session: str, ask: Ask, done: Future[list[Drawn]]) -> None:
        self._check(session)
        assert self._pool is not None
        self._pool.submit([ask])
        self._waiting[ask.name] = done

    def _check(self, session: str) -> None:
        if session != self._session or self._pool is None:
            raise StageError("another session has begun", place="rollouts.engines")

    async def _call(self, action: Callable[[], None]) -> None:
        """Runs `action` between two steps of the engine; raises what it raises."""
        future: Future[None] = Future()
        self._calls.put(lambda: carry_out(action, future))
        await asyncio.wrap_future(future)

    def _run(self) -> None:
        while True:
            if self._pool is None or not self._pool.busy:
                self._calls.get()()
            with contextlib.suppress(queue.Empty):
                while True:
                    self._calls.get_nowait()()
            if self._pool is not None and self._pool.busy:
                self._step(self._pool)

    def _step(self, pool: LocalPool) -> None:
        try:
            for name, group in pool.step():
                self._waiting.pop(name).set_result(group)
        except Exception as error:  # whoever waits must hear of it
            self._abandon(error)

    def _abandon(self, error: Exception) -> None:
        """Drops what is not answered."""
        if self._pool is not None:
            self._pool.clear()
        for each in self._waiting.values():
            each.set_exception(error)
        self._waiting = {}
