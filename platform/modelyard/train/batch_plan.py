"""How many sequences a step reads: constant, or rising at first (batch-size warm-up). Light: no torch.

A small batch early learns more a token (McCandlish et al. 2018, arXiv 1812.06162: the useful batch grows as the loss
falls); GPT-3 and Llama 3 raised theirs. The stream of sequences is the same; only where it is cut changes.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate


@dataclass(frozen=True)
class BatchPlan:
    """`first` sequences at step 0, `full` from step `rising` on, in between along a line."""

    full: int
    first: int
    rising: int = 0

    def size(self, step: int) -> int:
        """Sequences of a step (0-based)."""
        if step >= self.rising:
            return self.full
        return self.first + (self.full - self.first) * step // self.rising

    def before(self, step: int) -> int:
        """Sequences of all steps before `step`."""
        early = _before(self)
        if step <= self.rising:
            return early[step]
        return early[-1] + (step - self.rising) * self.full

    def steps(self, sequences: float) -> int:
        """The least number of steps that read `sequences` sequences; at least one."""
        early = _before(self)
        if sequences <= early[-1]:
            return max(1, bisect_left(early, sequences))
        return max(1, self.rising + int(-(-(sequences - early[-1]) // self.full)))


@lru_cache(maxsize=64)
def _before(plan: BatchPlan) -> list[int]:
    return list(accumulate((plan.size(step) for step in range(plan.rising)), initial=0))
