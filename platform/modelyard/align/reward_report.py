"""What a reward model is worth on held-out pairs: calibration, and whether it merely likes long answers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BINS = 10


def reward_figures(rewards: Floats, lengths: Floats) -> dict[str, float]:
    """Figures of pairs; `rewards` and `lengths` (answer tokens) are [pairs, 2], the preferred answer first.

    `calibration_error`: mean distance between the probability the model gives the answer it ranks first, sigmoid of
    the difference, and how often it is right, over bins of equal width (expected calibration error, Guo et al. 2017,
    arXiv 1706.04599). `length_correlation`: of reward and length. `accuracy_of_shorter`, `accuracy_of_longer`: where
    the preferred answer is the shorter or the longer one; absent where there are no such pairs.
    """
    difference = rewards[:, 0] - rewards[:, 1]
    right = difference > 0
    figures = {"calibration_error": calibration_error(difference, right)}
    flat, sizes = rewards.ravel(), lengths.ravel()
    spread = float(flat.std() * sizes.std())
    covariance = float(((flat - flat.mean()) * (sizes - sizes.mean())).mean())
    figures["length_correlation"] = covariance / spread if spread else 0.0
    for name, chosen in (("shorter", lengths[:, 0] < lengths[:, 1]), ("longer", lengths[:, 0] > lengths[:, 1])):
        if chosen.any():
            figures[f"accuracy_of_{name}"] = float(right[chosen].mean())
    return figures


def calibration_error(difference: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error of the answer ranked first; confidences lie between a half and 1."""
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum() - right[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / max(1, len(difference))
