"""What the outside adds to a step: hooks that every worker calls, and the few numbers workers exchange in a step."""

from __future__ import annotations

from collections.abc import Sequence

from modelyard.train.world import World


class Hooks:
    """Called by the loop on every worker; this one does nothing. A subclass overrides what it needs."""

    def begin(self, step: int, steps: int) -> None:
        """Before step `step` (0-based) of `steps`."""

    def beat(self) -> None:
        """A sign of life between steps: a checkpoint or an evaluation has been finished."""

    def end(self, step: int) -> None:
        """After step `step` (0-based), its report and its checkpoint."""

    def close(self) -> None:
        """After the last step, or after an error."""

    def asks(self) -> bool:
        """Whether this worker wants all workers to call `answer` at the end of this step. Must be cheap."""
        return False

    def answer(self) -> bool:
        """Called by all workers together when one of them asked; True on all = write a checkpoint now."""
        return False


class Chain(Hooks):
    """Several hooks as one."""

    def __init__(self, members: Sequence[Hooks]) -> None:
        self._members = tuple(members)

    def begin(self, step: int, steps: int) -> None:
        for member in self._members:
            member.begin(step, steps)

    def beat(self) -> None:
        for member in self._members:
            member.beat()

    def end(self, step: int) -> None:
        for member in self._members:
            member.end(step)

    def close(self) -> None:
        for member in self._members:
            member.close()

    def asks(self) -> bool:
        return any(member.asks() for member in self._members)

    def answer(self) -> bool:
        # All members answer, whatever the first ones said: an answer is a collective.
        answers = [member.answer() for member in self._members]
        return any(answers)


class Pulse:
    """Numbers that ride along in the one all-reduce of a step: whether a worker asks, and each one's own seconds."""

    def __init__(self, world: World, hooks: Hooks) -> None:
        self._world, self._hooks = world, hooks
        self.asked = False
        self.own_seconds: list[float] = []

    def pack(self, own: float) -> list[float]:
        """This worker's part, 1 + workers numbers, to be summed over workers."""
        mine = [0.0] * self._world.size
        mine[self._world.rank] = own
        return [float(self._hooks.asks()), *mine]

    def read(self, summed: Sequence[float]) -> None:
        """Takes the sums in."""
        self.asked, self.own_seconds = summed[0] > 0, list(summed[1:])

    def series(self) -> dict[str, float]:
        """How far the slowest worker is behind the median one: `straggle` (0.2 = 20 % slower) and which it is."""
        if self._world.size == 1:
            return {}
        ordered = sorted(self.own_seconds)
        middle = ordered[(len(ordered) - 1) // 2]
        slowest = max(range(len(self.own_seconds)), key=self.own_seconds.__getitem__)
        return {"straggle": self.own_seconds[slowest] / middle - 1 if middle else 0.0, "slowest_rank": float(slowest)}
