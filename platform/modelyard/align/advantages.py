"""From rewards to advantages, and how tokens are averaged: what tells the variants of GRPO apart."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

Variant = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"]
Floats = npt.NDArray[np.float64]

EPSILON = 1e-4
"""Added to standard deviations: a group of equal rewards has advantage 0, not 0 / 0."""


def advantages(rewards: Floats, variant: Variant) -> Floats:
    """Advantage of every answer; `rewards` and the result are [prompts, group].

    grpo and dapo: reward minus the group's mean, over its standard deviation (Shao et al. 2024, arXiv 2402.03300).
    dr_grpo: without the deviation, which favours questions that are nearly solved (Liu et al. 2025, arXiv 2503.20783).
    rloo: reward minus the mean of the others of the group (Ahmadian et al. 2024, arXiv 2402.14740).
    reinforce++: whitened over the whole batch (Hu 2025, arXiv 2501.03262).
    """
    mean, size = rewards.mean(axis=1, keepdims=True), rewards.shape[1]
    if variant == "dr_grpo":
        return np.asarray(rewards - mean)
    if variant == "rloo":
        return np.asarray((rewards - mean) * size / (size - 1))
    if variant == "reinforce++":
        return np.asarray((rewards - rewards.mean()) / (rewards.std(ddof=1) + EPSILON))
    return np.asarray((rewards - mean) / (rewards.std(axis=1, ddof=1, keepdims=True) + EPSILON))


def undecided(rewards: Floats) -> npt.NDArray[np.bool_]:
    """Groups whose answers all got the same reward: they teach nothing."""
    return np.asarray(np.ptp(rewards, axis=1) < 1e-12)
