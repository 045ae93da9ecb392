"""Where answers are drawn: a pool of engines, and one in this process.

A pool takes prompts, hands groups of answers back as they are done, and takes new weights in between: what is being
written then goes on with them, its prefix computed anew (partial rollouts). `stages.rollout_engines` has the pool whose
engines are Ray actors.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from modelyard.align.samples import Drawn, Prompt
from modelyard.engine import EngineCore, Request, Sampling, StepOutput
from modelyard.errors import DataError

Weights = Iterable[tuple[str, torch.Tensor]]
"""Whole tensors by Hugging Face names."""


@dataclass(frozen=True)
class Ask:
    """A prompt to be answered some times.

    Attributes:
        name: unique among what a pool has not answered yet.
        prompt: what to answer.
        sampling: how; the answers' seeds are one apart.
        answers: how many.
        least: version of the weights below which nothing of it may be begun.
        priority: smaller goes first.
    """

    name: str
    prompt: Prompt
    sampling: Sampling
    answers: int
    least: int = 0
    priority: int = 0

    def requests(self) -> list[Request]:
        """One an answer, ids `name-0 ..`; together they compute the prompt once."""
        return Request(self.name, self.prompt.ids, self.sampling, self.priority).samples(self.answers)


Answers = tuple[str, list[Drawn]]
"""The name of an `Ask` and its answers in order."""


class Pool(Protocol):
    """Engines that answer prompts. One thread uses it."""

    @property
    def shared(self) -> bool:
        """Whether it serves all workers, and rank 0 alone talks to it; else every worker has one of its own."""
        ...

    def update_weights(self, weights: Weights, version: int) -> None:
        """Puts `weights` in the place of those by these names, on all engines, before it returns."""
        ...

    def submit(self, asks: Sequence[Ask]) -> None:
        """Takes prompts in."""
        ...

    def results(self) -> list[Answers]:
        """Waits until some prompt has all its answers; those that have, each once."""
        ...

    def clear(self) -> None:
        """Forgets all that is not answered yet."""
        ...


class LocalPool:
    """Engines of this process, stepped in turns while somebody waits for results.

    Args:
        engines: one at least, of one model.
        shared: whether it serves all workers.
    """

    def __init__(self, engines: Sequence[EngineCore], shared: bool = False) -> None:
        self._engines, self.shared = list(engines), shared
        self._queue: list[tuple[int, int, Ask]] = []
        self._count = itertools.count()
        self._open: dict[str, _Open] = {}
        self._owner: dict[str, tuple[_Open, int]] = {}

    def update_weights(self, weights: Weights, version: int) -> None:
        """See `Pool`."""
        whole = list(weights) if len(self._engines) > 1 else weights
        for engine in self._engines:
            engine.update_weights(whole, version)

    def submit(self, asks: Sequence[Ask]) -> None:
        """See `Pool`. Raises ValueError for what the engines' weights are too old to begin."""
        for ask in asks:
            if ask.least > min(engine.version for engine in self._engines):
                raise ValueError(f"{ask.name} may not be begun before version {ask.least} of the weights")
            heapq.heappush(self._queue, (ask.priority, next(self._count), ask))

    @property
    def busy(self) -> bool:
        """Whether something is not answered yet."""
        return bool(self._queue or self._open)

    def results(self) -> list[Answers]:
        """See `Pool`. Raises as :meth:`step`."""
        found: list[Answers] = []
        while not found and self.busy:
            found = self.step()
        return found

    def step(self) -> list[Answers]:
        """One step of every engine; the prompts that have all their answers with it.

        Raises:
            DataError: the engine cannot take a prompt, or has failed on it.
        """
        found: list[Answers] = []
        for engine in self._engines:
            self._fill(engine)
            for name, output in engine.step():
                found += self._take(name, output)
        return found

    def clear(self) -> None:
        """See `Pool`."""
        for name, (group, _) in self._owner.items():
            group.engine.abort(name)
        self._queue, self._open, self._owner = [], {}, {}

    def _fill(self, engine: EngineCore) -> None:
        """Lets a prompt in when an engine has fewer waiting than it has slots: the others stay free to go elsewhere."""
        while self._queue and engine.scheduler.waiting < engine.options.max_sequences:
            _, _, ask = heapq.heappop(self._queue)
            group = self._open[ask.name] = _Open(ask, engine)
            for place, request in enumerate(ask.requests()):
                self._owner[request.id] = (group, place)
                engine.add(request)

    def _take(self, name: str, output: StepOutput) -> list[Answers]:
        group, place = self._owner[name]
        before = group.outputs[place]
        whole = group.outputs[place] = output if before is None else before + output
        if whole.finish is None:
            return []
        del self._owner[name]
        group.drawn[place] = drawn(whole, group.ask.prompt)
        if None in group.drawn:
            return []
        del self._open[group.ask.name]
        return [(group.ask.name, [d for d in group.drawn if d is not None])]


class _Open:
    """A prompt in an engine, with what has been written of its answers."""

    def __init__(self, ask: Ask, engine: EngineCore) -> None:
        self.ask, self.engine = ask, engine
        self.outputs: list[StepOutput | None] = [None] * ask.answers
        self.drawn: list[Drawn | None] = [None] * ask.answers


def drawn(output: StepOutput, prompt: Prompt) -> Drawn:
    """An answer from an engine's whole output. Raises DataError where the engine failed."""
    if output.finish == "error":
        raise DataError(f"the engine failed: {output.error}", place=prompt.place)
    logprobs = tuple(t.logprob for t in output.logprobs)
    return Drawn(output.tokens, logprobs, output.text, output.finish == "stop", output.weights, output.weights_first)
