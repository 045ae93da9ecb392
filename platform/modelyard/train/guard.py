"""What to do when a loss or a gradient stops being a number."""

from __future__ import annotations

import math

from modelyard.errors import StageError


class DivergedError(StageError):
    """Training produced losses or gradients that are not finite."""


class FiniteGuard:
    """Skips an update whose loss or gradient norm is not finite; gives up after `patience` in a row.

    Every worker sees the same reduced numbers and so decides the same.
    """

    def __init__(self, patience: int) -> None:
        self._patience, self._bad = patience, 0

    def accepts(self, step: int, loss: float, norm: float) -> bool:
        """Whether step `step` (0-based) may update the weights.

        Raises:
            DivergedError: at step 0, or when more than `patience` steps in a row were not finite.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            self._bad = 0
            return True
        self._bad += 1
        if step == 0 or self._bad > self._patience:
            raise DivergedError(
                f"loss {loss:g} and gradient norm {norm:g} at step {step + 1}, {self._bad} in a row not finite",
                place=f"step {step + 1}",
                mend="lower learning_rate, lengthen warmup, or look at the data and initial weights of this step",
            )
        return False
