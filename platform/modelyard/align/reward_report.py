"""What a reward model is worth on held-out pairs or steps: calibration, and whether it merely likes what is long."""

from __future__ import annotations

from collections.abc import Sequence

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
    figures["length_correlation"] = correlation(rewards.ravel(), lengths.ravel())
    for name, chosen in (("shorter", lengths[:, 0] < lengths[:, 1]), ("longer", lengths[:, 0] > lengths[:, 1])):
        if chosen.any():
            figures[f"accuracy_of_{name}"] = float(right[chosen].mean())
    return figures


def process_figures(answers: Sequence[Floats]) -> dict[str, float]:
    """Figures of answers in steps, each [steps, 3]: probability to be right, label, tokens.

    `calibration_error`: mean distance between probabilities and labels over bins of equal width.
    `first_wrong_accuracy`: answers of which the first step below a half is the first one labelled so, or that have none
    by both (ProcessBench, Zheng et al. 2024, arXiv 2412.06559). `accuracy_of_right`, `accuracy_of_wrong`: of steps
    labelled so, absent where there are none. `position_correlation`, `length_correlation`: of the probability with the
    step's number and tokens.
    """
    if not answers:
        return {}
    steps = np.concatenate(answers)
    found, labels = steps[:, 0], steps[:, 1]
    bins = np.minimum((found * BINS).astype(int), BINS - 1)
    gaps = [abs(float(found[bins == b].sum() - labels[bins == b].sum())) for b in range(BINS)]
    first = [_first_wrong(answer[:, 0]) == _first_wrong(answer[:, 1]) for answer in answers]
    figures = {
        "calibration_error": sum(gaps) / len(steps),
        "first_wrong_accuracy": float(np.mean(first)),
        "position_correlation": correlation(found, np.concatenate([np.arange(len(a), dtype=float) for a in answers])),
        "length_correlation": correlation(found, steps[:, 2]),
    }
    for name, chosen in (("right", labels >= 0.5), ("wrong", labels < 0.5)):
        if chosen.any():
            figures[f"accuracy_of_{name}"] = float(((found >= 0.5) == (labels >= 0.5))[chosen].mean())
    return figures


def _first_wrong(values: Floats) -> int:
    """Number of the first step below a half; that after the last where there is none."""
    wrong = np.flatnonzero(values < 0.5)
    return int(wrong[0]) if len(wrong) else len(values)


def correlation(one: Floats, other: Floats) -> float:
    """Pearson's, 0 where either does not vary."""
    spread = float(one.std() * other.std())
    return float(((one - one.mean()) * (other - other.mean())).mean()) / spread if spread else 0.0


def calibration_error(difference: Floats, right: npt.NDArray[np.bool_]) -> float:
    """Expected calibration error of the answer ranked first; confidences lie between a half and 1."""
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs(float(confidence[bins == b].sum() - right[bins == b].sum())) for b in range(BINS)]
    return sum(gaps) / max(1, len(difference))
