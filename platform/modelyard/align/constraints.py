"""Rewards that must reach a mean: a Lagrange multiplier for each, steered after every set of answers.

Safe RLHF (Dai et al. 2023, arXiv 2310.12773, section 3.3): maximise the reward R while the mean of a constrained reward
S stays at or above a bound. The policy learns from (R + sum of lambda S) / (1 + sum of lambda); lambda rises while S is
below the bound and falls while it is above.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from modelyard.align.reward_options import ConstraintOptions

Floats = npt.NDArray[np.float64]


class Multiplier:
    """The multiplier of one constrained reward.

    Attributes:
        state: the multiplier, a float64 scalar; what checkpoints hold.
    """

    def __init__(self, options: ConstraintOptions) -> None:
        self._options = options
        self.state = torch.tensor(min(options.start, options.most), dtype=torch.float64)

    @property
    def value(self) -> float:
        """As it is now."""
        return float(self.state)

    def update(self, mean: float) -> None:
        """After a set of answers whose constrained reward has this mean: gradient ascent on the logarithm."""
        o, value = self._options, self.value
        logarithm = math.log(value) + o.rate * value * (o.at_least - mean)
        self.state.fill_(math.exp(max(-20.0, min(math.log(o.most), logarithm))))


def mixed(reward: Floats, constrained: list[tuple[float, Floats]]) -> Floats:
    """What the policy learns from: the reward [n], and by multiplier every constrained reward [n]."""
    total = reward + sum((value * part for value, part in constrained), np.zeros_like(reward))
    return np.asarray(total / (1 + sum(value for value, _ in constrained)))
