"""A pool of engines that are Ray actors, as rank 0 of the trainers sees it: weights out, prompts out, answers in.

An engine that dies is started again by Ray, on its bundle of the placement group; it gets the weights as they are, and
what it had not answered is asked again, of whichever engine is ready. Names of prompts and draws are what they were, so
that nothing is lost or doubled.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelyard.errors import ResourceError, StageError
from modelyard.stages.remote import plain_errors
from modelyard.stages.rollout_actor import packed, packed_bytes

if TYPE_CHECKING:
    from modelyard.align.environment import Telling
    from modelyard.align.options import EngineGroup, RolloutEngine
    from modelyard.align.pool import Answers, Ask
    from modelyard.align.weights import Weights
    from modelyard.train.metrics import Say

_AGAIN_SECONDS = 0.2


@dataclass(eq=False)
class _Engine:
    """One actor: what it is to answer; the call that is to make it ready and the version that the call brings; how
    often it died, and since when it has been starting."""

    number: int
    actor: Any
    session: str = ""
    ready: bool = False
    coming: Any = None
    version: int = -1
    deaths: int = 0
    since: float = field(default_factory=time.monotonic)
    asked: dict[Any, Ask] = field(default_factory=dict)

    @property
    def load(self) -> int:
        """Answers it owes."""
        return sum(ask.answers for ask in self.asked.values())

    @property
    def calls(self) -> list[Any]:
        """What it may send next."""
        return [*self.asked, *([self.coming] if self.coming is not None else [])]


class RayPool:
    """See the module; `align.pool.Pool`.

    Args:
        actors: handles of `RolloutActor`.
        settings: of their engines.
        telling: what answers are told between turns.
        group: how many restarts and how long to wait.
        say: takes messages for people.
    """

    shared = True

    def __init__(
        self, actors: Sequence[Any], settings: RolloutEngine, telling: Telling | None, group: EngineGroup, say: Say
    ) -> None:
        self._settings, self._telling, self._group, self._say = settings, telling, group, say
        self._engines = [_Engine(number, actor) for number, actor in enumerate(actors)]
        self._held: list[Ask] = []
        self._weights: Any = None
        self._version = -1
        for engine in self._engines:
            self._begin(engine)

    def update_weights(self, weights: Weights, version: int) -> None:
        """See `Pool`. They are put into the object store once and fetched by each engine; one that is starting gets
        them when it has started.

        Raises:
            StageError: an engine has not taken them in time.
            ResourceError: none is left.
        """
        import ray

        first = self._weights is None
        self._weights = None  # lets the store drop the last ones before it takes these
        whole = packed(weights)
        self._warn(packed_bytes(whole))
        self._weights, self._version = ray.put(whole), version
        waited = [engine for engine in self._engines if first or engine.ready]
        for engine in waited:
            if engine.ready:
                self._update(engine)
        self._await(waited)

    def submit(self, asks: Sequence[Ask]) -> None:
        """See `Pool`."""
        self._held += asks
        self._place()

    def results(self) -> list[Answers]:
        """See `Pool`.

        Raises:
            StageError: no engine has said anything for long.
            ResourceError: no engine is left.
            ModelyardError: what an engine raised on purpose.
        """
        import ray

        found: list[Answers] = []
        end = time.monotonic() + self._group.answer_timeout
        while not found:
            owners = {call: engine for engine in self._engines for call in engine.calls}
            if not owners:
                return []
            ready, _ = ray.wait(list(owners), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                raise StageError(
                    f"no engine has answered for {self._group.answer_timeout:g} s",
                    place="rollouts.engines",
                    mend="look at their logs, or raise rollouts.engines.answer_timeout",
                )
            ready, _ = ray.wait(list(owners), num_returns=len(owners), timeout=0)
            for call in ready:
                found += self._receive(owners[call], call)
        return found

    def clear(self) -> None:
        """See `Pool`: every engine begins a new session."""
        self._held = []
        for engine in self._engines:
            engine.asked = {}
            self._begin(engine)
        self._await(list(self._engines))

    def close(self) -> None:
        """See `Pool`. The actors end with who placed them."""

    def _place(self) -> None:
        """Hands what is held to engines that are ready, each to the one that owes least."""
        ready = [engine for engine in self._engines if engine.ready]
        while ready and self._held:
            ask = self._held.pop(0)
            engine = min(ready, key=lambda each: each.load)
            engine.asked[engine.actor.answer.remote(engine.session, ask)] = ask

    def _begin(self, engine: _Engine) -> None:
        engine.session, engine.ready, engine.version = uuid.uuid4().hex, False, self._version
        engine.coming = engine.actor.begin.remote(
            engine.session, self._settings, self._telling, self._version, self._weights
        )

    def _update(self, engine: _Engine) -> None:
        engine.version = self._version
        engine.coming = engine.actor.update.remote(engine.session, self._version, self._weights)

    def _receive(self, engine: _Engine, call: Any) -> list[Answers]:
        """Takes in what came of a call."""
        import ray
        from ray.exceptions import RayActorError

        if call != engine.coming and call not in engine.asked:
            return []  # the engine was lost since
        try:
            with plain_errors():
                value = ray.get(call)
        except RayActorError as error:
            self._lost(engine, error)
            return []
        if call == engine.coming:
            self._came(engine)
            return []
        return [(engine.asked.pop(call).name, value)]

    def _came(self, engine: _Engine) -> None:
        """An engine has begun or has taken weights."""
        engine.coming = None
        if engine.version < self._version:
            self._update(engine)
            return
        engine.ready = self._weights is not None
        self._place()

    def _lost(self, engine: _Engine, error: Exception) -> None:
        """An engine has died, or is not there yet: Ray starts it again, as often and as long as the limits say."""
        import ray

        if not engine.ready:
            time.sleep(_AGAIN_SECONDS)  # a call to an actor that is being started fails at once
        else:
            engine.deaths, engine.since = engine.deaths + 1, time.monotonic()
        unanswered, died = list(engine.asked.values()), engine.ready
        engine.asked, engine.coming, engine.ready = {}, None, False
        self._held += unanswered
        first = str(error).strip().splitlines()[0]
        why = first.partition(" is unavailable: ")[2] or first
        goes_on = engine.deaths <= self._group.restarts
        goes_on &= time.monotonic() - engine.since < self._group.sync_timeout
        if goes_on:
            self._begin(engine)
        else:
            self._engines.remove(engine)
            ray.kill(engine.actor)
        if not self._engines:
            raise ResourceError(
                f"no rollout engine is left; the last one died {engine.deaths} times: {why}",
                place="rollouts.engines",
                mend="give them more memory, or lower engine.max_sequences; the same command goes on from the last "
                "checkpoint",
            )
        if died or not goes_on:
            fate = "is started again" if goes_on else "did not come back and is left out"
            self._say(
                f"rollout engine {engine.number} died ({why}) and {fate}; {len(unanswered)} prompts are asked again"
            )
        self._place()

    def _await(self, engines: Sequence[_Engine]) -> None:
        """Until these are ready (one that dies meanwhile is no longer waited for). Raises StageError."""
        import ray

        end = time.monotonic() + self._group.sync_timeout
        session = {engine.number: engine.session for engine in engines}
        while True:
            coming = {e.coming: e for e in engines if e.coming is not None and e.session == session[e.number]}
            if not coming:
                return
            ready, _ = ray.wait(list(coming), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                names = ", ".join(str(engine.number) for engine in coming.values())
                raise StageError(
                    f"rollout engines {names} have not taken the weights in {self._group.sync_timeout:g} s",
                    place="rollouts.engines",
                    mend="look at their logs, or raise rollouts.engines.sync_timeout",
                )
            for call in ready:
                self._receive(coming[call], call)

    def _warn(self, size: int) -> None:
        """Says once when the weights do not fit the object store, and Ray would put them on a disk."""
        import ray

        room = ray.cluster_resources().get("object_store_memory", 0.0)
        if self._version < 0 and size > 0.8 * room:
            self._say(f"the weights have {size / 2**20:,.0f} MiB, Ray's object store {room / 2**20:,.0f}: they will go "
                      "through a disk; set MODELYARD_OBJECT_STORE (2GiB, say), or on a cluster give ray start a larger "
                      "--object-store-memory")  # fmt: skip
