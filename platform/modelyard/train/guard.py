"""What to do when a loss or a gradient stops being a number, or jumps: skip, go back to a checkpoint, lower the rate.

Decisions follow from the table of past steps alone, which every checkpoint holds and every worker has: a resumed run
and all workers decide the same.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Sequence

from modelyard.errors import StageError
from modelyard.train.checkpoint import Row
from modelyard.train.run_options import SpikeOptions

_SIGMA = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""


class DivergedError(StageError):
    """Training produced losses or gradients that are not finite."""


class Verdict(enum.Enum):
    """What becomes of an update."""

    ACCEPT = "accept"
    SKIP = "skip"
    REWIND = "rewind"


class Guard:
    """Judges each update by its loss and gradient norm.

    Args:
        patience: non-finite updates in a row that are skipped before giving up (or going back).
        spikes: what counts as a spike of finite losses and how often to go back; None = no such policy.
    """

    def __init__(self, patience: int, spikes: SpikeOptions | None = None) -> None:
        self._patience, self._spikes, self._rewinds = patience, spikes, 0

    def rewinds(self, history: Sequence[Row]) -> int:
        """How often this run has gone back."""
        return max(self._rewinds, int(history[-1].get("rewinds", 0)) if history else 0)

    def rate(self, history: Sequence[Row]) -> float:
        """Factor on the learning rate after the rewinds so far."""
        return self._spikes.rate ** self.rewinds(history) if self._spikes else 1.0

    def lower(self, history: Sequence[Row]) -> None:
        """Notes one more rewind; `history` is the table before it."""
        self._rewinds = self.rewinds(history) + 1

    def judge(self, history: Sequence[Row], loss: float, norm: float) -> Verdict:
        """Whether the update after the steps of `history` may change the weights.

        Raises:
            DivergedError: the first step, or more than `patience` in a row, were not finite and no rewind is left.
        """
        bad = skipped_in_a_row(history) + 1
        may_rewind = self._spikes is not None and self.rewinds(history) < self._spikes.rewinds and bool(history)
        if math.isfinite(loss) and math.isfinite(norm):
            if self._spikes is None or not is_spike(history, loss, self._spikes):
                return Verdict.ACCEPT
            if bad <= self._spikes.skips:
                return Verdict.SKIP
            # A level that stays is the new level, unless going back is allowed.
            return Verdict.REWIND if may_rewind else Verdict.ACCEPT
        if history and bad <= self._patience:
            return Verdict.SKIP
        if may_rewind:
            return Verdict.REWIND
        step = int(history[-1]["step"]) + 1 if history else 1
        raise DivergedError(
            f"loss {loss:g} and gradient norm {norm:g} at step {step}, {bad} in a row not finite",
            place=f"step {step}",
            mend="lower learning_rate, lengthen warmup, or look at the data and initial weights of this step",
        )


def skipped_in_a_row(history: Sequence[Row]) -> int:
    """Updates left out since the last one that was made."""
    count = 0
    for row in reversed(history):
        if not row.get("skipped"):
            break
        count += 1
    return count


def is_spike(history: Sequence[Row], loss: float, options: SpikeOptions) -> bool:
    """Whether a loss is far above the median of the last accepted ones, in robust standard deviations."""
    recent = [row["loss"] for row in history[-2 * options.window :] if not row.get("skipped")][-options.window :]
    if len(recent) < options.window // 2:
        return False
    middle = statistics.median(recent)
    spread = _SIGMA * statistics.median(abs(value - middle) for value in recent)
    return loss > middle + options.deviations * max(spread, 1e-3)
