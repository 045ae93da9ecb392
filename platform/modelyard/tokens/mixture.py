"""Batches mixed from several sources by weights that may change with the step; a pure function of (seed, step).

Let S be a scale (2^32), w_k(s) the integer weights of step s (their sum is S), B(s) the batch. Source k is owed
e_k = sum_{t<=s} B(t) w_k(t) - S * (sequences it has given so far). Every sequence of a batch is taken, one after the
other, from the source owed most. What is owed sums to S times the sequences left to take, so the largest is positive:
no source is ever one whole sequence ahead of its share, hence with K sources none is K-1 or more behind. The counts
therefore differ from the exact shares by less than K-1 sequences, however long the run, and no matter how weights move.
All of it is integer arithmetic: the same on every machine.

Within a source the order is that of `tokens.order`: every sequence once an epoch of that source, a new permutation each
epoch. Counts follow from all steps before: going forward costs a step each, starting at step s costs s of them (about
20 microseconds a step). Memory: one integer a source.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from modelyard.errors import DataError
from modelyard.tokens.order import permute, stream_indices

Indices = npt.NDArray[np.int64]
Milestones = Sequence[tuple[int, Mapping[str, float]]]

_SCALE = 1 << 32
_APART = 1_000_003
"""Keeps the permutations of the sources apart."""


class MixtureOrder:
    """The order of sequences drawn from several ranges of global indices.

    Args:
        sources: name -> range of global indices, such as `TokenDataset.source_range` gives.
        milestones: (step, weights by name) in rising order of step; weights move along a line from one to the next
            and stay as they are before the first and after the last. A name left out weighs nothing.
        seed: of the order.
        batch: sequences of a step.

    Raises:
        DataError: a weight names no source, is negative, all are zero, or a source with weight is empty.
    """

    def __init__(
        self, sources: Mapping[str, range], milestones: Milestones, seed: int, batch: Callable[[int], int]
    ) -> None:
        _check(sources, milestones)
        self._ranges, self._seed, self._batch = list(sources.values()), seed, batch
        self._milestones = [(step, _integers([weights.get(n, 0.0) for n in sources])) for step, weights in milestones]
        self._lock = threading.Lock()
        self._restart()

    def _restart(self) -> None:
        self._step, self._owed = 0, np.zeros(len(self._ranges), dtype=np.int64)
        self._used = [0] * len(self._ranges)

    def weights(self, step: int) -> npt.NDArray[np.int64]:
        """The weights of a step as integers of sum 2^32, in the order of the sources."""
        at = sum(1 for start, _ in self._milestones if start <= step)
        if at == 0 or at == len(self._milestones):
            return self._milestones[max(0, at - 1)][1]
        (begin, before), (end, after) = self._milestones[at - 1], self._milestones[at]
        return _exact(before + (after - before) * (step - begin) // (end - begin))

    def counts(self, step: int) -> list[int]:
        """How many sequences of each source the batch of `step` holds."""
        with self._lock:
            return self._advance(step)[0]

    def indices(self, step: int) -> Indices:
        """Global indices of the batch of `step`, int64, the sources shuffled among each other."""
        with self._lock:
            counts, used = self._advance(step)
        parts = [
            allowed.start + stream_indices(self._seed + (k + 1) * _APART, used[k], counts[k], len(allowed))
            for k, allowed in enumerate(self._ranges)
            if counts[k]
        ]
        together = np.concatenate(parts)
        return together[permute(np.arange(len(together)), len(together), self._seed, step)]

    def _advance(self, step: int) -> tuple[list[int], list[int]]:
        """Counts of `step`, and what each source had given before it."""
        if step < self._step:
            self._restart()
        while True:
            used, size = list(self._used), self._batch(self._step)
            counts = _share(self._owed + size * self.weights(self._step), size)
            at, self._step = self._step, self._step + 1
            self._owed += size * self.weights(at) - np.asarray(counts, dtype=np.int64) * _SCALE
            self._used = [u + c for u, c in zip(used, counts, strict=True)]
            if at == step:
                return counts, used


def _share(owed: npt.NDArray[np.int64], size: int) -> list[int]:
    """Takes `size` sequences, one by one, from the source owed most; the first of equals.

    Those are the `size` largest of all e_k - i * S (i = 0, 1, ...), of which only positive ones can be reached.
    """
    depth = np.maximum(0, -(-owed // _SCALE))
    owner = np.repeat(np.arange(len(owed)), depth)
    level = np.arange(len(owner)) - np.repeat(np.cumsum(depth) - depth, depth)
    chosen = np.argsort(-(owed[owner] - level * _SCALE), kind="stable")[:size]
    return [int(n) for n in np.bincount(owner[chosen], minlength=len(owed))]


def _integers(weights: Sequence[float]) -> npt.NDArray[np.int64]:
    total = sum(weights)
    return _exact(np.array([int(weight / total * _SCALE) for weight in weights], dtype=np.int64))


def _exact(weights: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Gives what rounding lost to the heaviest source, so that the sum is exact and nothing of weight 0 is drawn."""
    weights = weights.copy()
    weights[int(np.argmax(weights))] += _SCALE - int(weights.sum())
    return weights


def _check(sources: Mapping[str, range], milestones: Milestones) -> None:
    steps = [step for step, _ in milestones]
    if not steps or steps != sorted(set(steps)):
        raise DataError("a mixture needs milestones whose steps rise", place="mixture")
    for step, weights in milestones:
        place = f"mixture, step {step}"
        unknown = [name for name in weights if name not in sources]
        if unknown:
            known = ", ".join(sources)
            raise DataError(f"there is no source {unknown[0]!r}", place=place, mend=f"the tokens hold {known}")
        if any(not 0 <= weight < float("inf") for weight in weights.values()) or not any(weights.values()):
            raise DataError("weights must be numbers of at least 0, not all 0", place=place)
        empty = [name for name, weight in weights.items() if weight and not len(sources[name])]
        if empty:
            raise DataError(f"source {empty[0]!r} holds no sequences", place=place, mend="give it the weight 0")
