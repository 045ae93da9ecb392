"""Scoring by Ray actors: the reference and reward models apart from the trainers, and a trainer's view of them.

An actor holds one model and nothing else, so that its death costs a load: Ray starts it again in its place and repeats
the calls that were lost. One that has died too often is left out, and what it owed is asked of the others.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import ResourceError, StageError
from modelyard.stages.remote import plain_errors
from modelyard.stages.train_worker import Place, bring

if TYPE_CHECKING:
    from modelyard.align.options import ScorerGroup
    from modelyard.align.scoring import Here, Setup, Wait
    from modelyard.train.metrics import Say


class ScorerActor:
    """A model that scores, for all trainers, one call after the other.

    Args:
        model: its folder.
        threads: it computes with.
    """

    def __init__(self, model: Place, threads: int) -> None:
        self._model, self._threads = model, threads
        self._life = uuid.uuid4().hex
        self._setup: Setup | None = None
        self._scorer: Here | None = None

    def score(self, setup: Setup, items: Sequence[Any]) -> tuple[str, list[Any]]:
        """A name of this life of the actor, and the results of items; builds the model if it has none of this setup.

        Raises:
            ModelyardError: as `setup.build` and the scorer itself.
            StorageError: the model cannot be brought here.
        """
        import torch

        if self._scorer is None or setup != self._setup:
            self._scorer = None
            self._scorer, self._setup = setup.build(Path(str(bring(self._model)))), setup
            torch.set_num_threads(self._threads)
        return self._life, list(self._scorer(items)) if items else []


@dataclass(frozen=True)
class _Part:
    """Places of items that an actor was asked for."""

    number: int
    places: tuple[int, ...]


class RayScorer:
    """See the module; `align.scoring.Scorer`. One trainer's: each asks all actors for a part of its items.

    Args:
        role: name of the role, for messages.
        actors: handles of `ScorerActor`.
        setup: of their model.
        group: how long to wait.
        say: takes messages for people.

    Raises:
        ModelyardError: the model cannot be built.
        StageError: not in time.
        ResourceError: no actor is left.
    """

    def __init__(self, role: str, actors: Sequence[Any], setup: Setup, group: ScorerGroup, say: Say) -> None:
        self._role, self._setup, self._group, self._say = role, setup, group, say
        self._actors = dict(enumerate(actors))
        self._lives: dict[int, str] = {}
        self._collect({self._call(number, []): _Part(number, ()) for number in self._actors}, [], group.start_timeout)

    def begin(self, items: Sequence[Any]) -> Wait:
        """See `Scorer`. The wait raises as the constructor does."""
        calls = self._share(tuple(range(len(items))), items)
        return lambda: self._collect(calls, items, self._group.answer_timeout)

    def _share(self, places: tuple[int, ...], items: Sequence[Any]) -> dict[Any, _Part]:
        """Asks for the items at `places`, every n-th one of the n actors that are left."""
        numbers = list(self._actors)
        parts = [_Part(number, places[i :: len(numbers)]) for i, number in enumerate(numbers)]
        return {self._call(p.number, [items[i] for i in p.places]): p for p in parts if p.places}

    def _call(self, number: int, items: list[Any]) -> Any:
        return self._actors[number].score.remote(self._setup, items)

    def _collect(self, calls: dict[Any, _Part], items: Sequence[Any], timeout: float) -> list[Any]:
        """Waits for all results. What an actor that is gone owes, the others are asked for."""
        import ray
        from ray.exceptions import RayActorError

        found: list[Any] = [None] * len(items)
        end = time.monotonic() + timeout
        while calls:
            ready, _ = ray.wait(list(calls), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise StageError(
                    f"{self._role} has said nothing for {timeout:g} s",
                    place=self._place,
                    mend=f"look at the actors' logs, or raise start_timeout or answer_timeout of {self._place}",
                )
            part = calls.pop(ready[0])
            try:
                with plain_errors():
                    life, values = ray.get(ready[0])
            except RayActorError as error:
                self._lost(part.number, error)
                calls |= self._share(part.places, items)
                continue
            self._heard(part.number, life)
            for place, value in zip(part.places, values, strict=True):
                found[place] = value
            end = time.monotonic() + timeout
        return found

    @property
    def _place(self) -> str:
        return f"rollouts.{self._role.partition('/')[0]}"

    def _heard(self, number: int, life: str) -> None:
        """Says so when an actor has been started again since it was last heard."""
        if self._lives.get(number, life) != life:
            self._say(f"{self._role} {number} died and was started again")
        self._lives[number] = life

    def _lost(self, number: int, error: Exception) -> None:
        """Leaves an actor out that Ray starts no more. Raises ResourceError."""
        if self._actors.pop(number, None) is None:
            return
        why = str(error).strip().splitlines()[0]
        if not self._actors:
            raise ResourceError(
                f"no {self._role} is left: {why}",
                place=self._place,
                mend="give it more memory, or raise restarts; the same command goes on from the last checkpoint",
            )
        self._say(f"{self._role} {number} died more than {self._group.restarts} times and is left out")
