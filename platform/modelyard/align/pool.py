"""Where answers are drawn: a pool of engines, and one in this process.

A pool takes prompts, hands groups of answers back as they are done, and takes new weights in between: what is being
written then goes on with them, its prefix computed anew (partial rollouts). `stages.rollout_pool` has the one whose
engines are Ray actors.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from modelyard.align.environment import Environment, Telling, Told
from modelyard.align.episodes import Episode
from modelyard.align.function_process import FunctionFailed
from modelyard.align.samples import Drawn, Prompt
from modelyard.align.weights import BaseWeights, Weights
from modelyard.engine import Request, Sampling, Tokenizer
from modelyard.engine.protocol import Stepper

_LOOK_SECONDS = 0.05
"""How long a step waits for an environment when there is nothing to write."""


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

    def close(self) -> None:
        """Lets go of what this process holds for it."""
        ...


class LocalPool:
    """Engines of this process, stepped in turns while somebody waits for results.

    Args:
        engines: one at least, of one model.
        model: the model's folder.
        shared: whether it serves all workers.
        telling: what answers are told between their turns; None = they are one turn.

    Raises:
        DataError: the folder has no weights.
        RecipeError: the environment cannot be imported.
    """

    def __init__(
        self, engines: Sequence[Stepper], model: Path, shared: bool = False, telling: Telling | None = None
    ) -> None:
        self._engines, self.shared, self._base = list(engines), shared, BaseWeights(model)
        self._queue: list[tuple[int, int, Ask]] = []
        self._count = itertools.count()
        self._open: dict[str, _Open] = {}
        self._writing: dict[str, _Place] = {}
        self._told: dict[Future[Told], _Place] = {}
        self._asked: dict[Future[Prompt], _Place] = {}
        self._environment = Environment(telling, model) if telling is not None else None

    def update_weights(self, weights: Weights, version: int) -> None:
        """See `Pool`."""
        whole = list(weights) if len(self._engines) > 1 else weights
        for engine in self._engines:
            engine.update_weights(self._base.whole(whole), version)

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
            RecipeError: the environment's process ended and cannot be started again.
        """
        heard: list[Future[Any]] = [*self._told, *self._asked]
        if heard and not self._writing and (self._asked or not self._queue):
            wait(heard, _LOOK_SECONDS, FIRST_COMPLETED)
        self._begin()
        found = self._heard()
        for engine in self._engines:
            self._fill(engine)
            for name, output in engine.step():
                place = self._writing[name]
                if place.episode.take(output):
                    del self._writing[name]
                    found += self._ended(place)
        return found

    def clear(self) -> None:
        """See `Pool`."""
        for name, place in self._writing.items():
            place.group.engine.abort(name)
        self._queue, self._open, self._writing, self._told, self._asked = [], {}, {}, {}, {}
        if self._environment is not None:
            self._environment.close()

    def close(self) -> None:
        """See `Pool`."""
        self.clear()
        for engine in self._engines:
            engine.close()

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._engines[0].tokenizer
        assert tokenizer is not None, "answers have text"
        return tokenizer

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens)

    def _fill(self, engine: Stepper) -> None:
        """Lets a prompt in when an engine has fewer waiting than it has slots: the others stay free to go elsewhere."""
        environment = self._environment
        while self._queue and self._waiting(engine) < engine.options.max_sequences:
            _, _, ask = heapq.heappop(self._queue)
            group = self._open[ask.name] = _Open(ask, engine, [None] * ask.answers)
            for number, request in enumerate(ask.requests()):
                place = _Place(group, number, Episode(ask.prompt, request))
                if environment is not None and environment.resets:
                    self._asked[environment.reset(place.name, ask.prompt)] = place
                else:
                    self._write(place)

    def _waiting(self, engine: Stepper) -> int:
        return engine.waiting + sum(place.group.engine is engine for place in self._asked.values())

    def _begin(self) -> None:
        """Begins the episodes that are reset, with the prompts they were given. One whose reset failed is written a
        turn of all the same, to the prompt it had: it is an answer like others."""
        for future in [each for each in self._asked if each.done()]:
            place = self._asked.pop(future)
            try:
                self._ask(place, future.result())
            except FunctionFailed as error:
                place.episode.failure = str(error)
            self._write(place)

    def _ask(self, place: _Place, prompt: Prompt) -> None:
        """Takes the prompt a reset gave. Raises FunctionFailed for one that is too long."""
        assert self._environment is not None
        if prompt is place.group.ask.prompt:
            return
        room = place.group.engine.max_length - place.group.ask.sampling.max_tokens - self._environment.telling.longest
        if len(prompt.ids) > room:
            raise FunctionFailed(f"{self._environment.telling.options.function} reset to a prompt of {len(prompt.ids)} "
                                 f"tokens, above rollouts.environment.prompt_tokens ({room})")  # fmt: skip
        place.episode.ask(prompt)

    def _write(self, place: _Place) -> None:
        request = place.episode.request
        self._writing[request.id] = place
        place.group.engine.add(request)

    def _ended(self, place: _Place) -> list[Answers]:
        """A turn has: the environment is asked, unless there is none or the answer was cut."""
        episode, environment = place.episode, self._environment
        if environment is None or episode.failure or not episode.stopped:
            return self._done(place)
        before = episode.prompt.text + self._decode(episode.before)
        asked = environment.ask(place.name, episode.turn, before, episode.text, episode.prompt.row)
        self._told[asked] = place
        return []

    def _heard(self) -> list[Answers]:
        """Takes in what environments have said: the next turn of an answer, or its end."""
        found: list[Answers] = []
        for future in [each for each in self._told if each.done()]:
            place = self._told.pop(future)
            try:
                told = future.result()
            except FunctionFailed as error:
                place.episode.failure = str(error)
                found += self._done(place)
                continue
            place.episode.earned += told.reward
            if not self._goes_on(place, told):
                found += self._done(place)
        return found

    def _goes_on(self, place: _Place, told: Told) -> bool:
        """Begins the next turn, if there is one."""
        assert self._environment is not None
        telling, episode = self._environment.telling, place.episode
        if told.observation is None or episode.turn + 1 >= telling.options.turns or episode.room < 1:
            return False
        if telling.options.form == "plain" and episode.last in place.group.engine.end_tokens:
            return False  # the answer has ended itself
        episode.tell(told.observation, telling.ids(self._environment.encode(told.observation), episode.last))
        self._write(place)
        return True

    def _done(self, place: _Place) -> list[Answers]:
        group = place.group
        plain = self._environment is not None and self._environment.telling.options.form == "plain"
        # An answer with tools inside it is one text; the last message of a conversation is what is rewarded.
        text = self._decode(place.episode.tokens) if plain else place.episode.text
        group.drawn[place.number] = place.episode.drawn(text)
        if None in group.drawn:
            return []
        del self._open[group.ask.name]
        return [(group.ask.name, [d for d in group.drawn if d is not None])]


@dataclass(eq=False)
class _Open:
    """A prompt in an engine, with its answers as far as they are done."""

    ask: Ask
    engine: Stepper
    drawn: list[Drawn | None]


@dataclass(eq=False)
class _Place:
    """Which answer of its prompt an episode is."""

    group: _Open
    number: int
    episode: Episode

    @property
    def name(self) -> str:
        """Of its episode."""
        return f"{self.group.ask.name}-{self.number}"
