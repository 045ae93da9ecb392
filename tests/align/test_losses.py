"""Preference losses against the papers' formulas in scalar float64, with gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from modelyard.align import losses
from modelyard.align.reward_report import reward_figures

torch.manual_seed(0)
CHOSEN, REJECTED = -torch.rand(6) * 3 - 0.05, -torch.rand(6) * 3 - 0.05
LIKED = torch.tensor([True, False, True, True, False, False])


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def odds(p: float) -> float:
    return p / (1 - p)


def orpo(c: float, r: float) -> float:
    return -c - 0.1 * math.log(sigmoid(math.log(odds(math.exp(c)) / odds(math.exp(r)))))


@pytest.mark.parametrize(
    ("ours", "paper"),
    [
        (lambda c, r: losses.dpo(c, r, 0.3), lambda c, r: -math.log(sigmoid(0.3 * (c - r)))),
        (
            lambda c, r: losses.dpo(c, r, 0.3, 0.1),
            lambda c, r: -0.9 * math.log(sigmoid(0.3 * (c - r))) - 0.1 * math.log(sigmoid(-0.3 * (c - r))),
        ),
        (lambda c, r: losses.ipo(c, r, 0.2), lambda c, r: (c - r - 1 / 0.4) ** 2),
        (lambda c, r: losses.orpo(c, r, -c, 0.1), orpo),
        (lambda c, r: losses.simpo(c, r, 2.0, 0.7), lambda c, r: -math.log(sigmoid(2 * (c - r) - 0.7))),
        (
            lambda c, r: losses.bradley_terry(c, r, torch.full((6,), 0.5), 0.01),
            lambda c, r: -math.log(sigmoid(c - r - 0.5)) + 0.01 * (c + r) ** 2,
        ),
    ],
    ids=["dpo", "cdpo", "ipo", "orpo", "simpo", "bradley_terry"],
)
def test_pairwise_losses_and_gradients(
    ours: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], paper: Callable[[float, float], float]
) -> None:
    c, r = CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_()
    found = ours(c, r)
    wanted = [paper(a, b) for a, b in zip(c.tolist(), r.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    found.sum().backward()
    step = 1e-5
    for name, mine in (("chosen", c), ("rejected", r)):
        for i, (a, b) in enumerate(zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)):
            high = paper(a + step, b) if name == "chosen" else paper(a, b + step)
            low = paper(a - step, b) if name == "chosen" else paper(a, b - step)
            assert mine.grad is not None
            assert float(mine.grad[i]) == pytest.approx((high - low) / (2 * step), rel=1e-3, abs=1e-4)


def test_kto_by_hand() -> None:
    found = losses.kto(CHOSEN, LIKED, torch.tensor(0.4), 0.2, 1.0, 1.5)
    for loss, ratio, liked in zip(found.tolist(), CHOSEN.tolist(), LIKED.tolist(), strict=True):
        gain = 0.2 * (ratio - 0.4) if liked else 0.2 * (0.4 - ratio)
        assert loss == pytest.approx((1.0 if liked else 1.5) * (1 - sigmoid(gain)), rel=1e-6)


def test_a_certain_answer_has_a_finite_gradient() -> None:
    sure = torch.tensor([0.0, -1e-9], requires_grad=True)
    losses.orpo(sure, torch.tensor([-1.0, -2.0]), -sure, 0.1).sum().backward()
    assert sure.grad is not None
    assert sure.grad.isfinite().all()


def test_what_a_reward_model_is_worth() -> None:
    rewards = np.asarray([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0], [3.0, 1.0]])
    lengths = np.asarray([[9.0, 3.0], [2.0, 8.0], [5.0, 5.0], [8.0, 4.0]])
    found = reward_figures(rewards, lengths)
    sure, less = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(-1))
    assert found["calibration_error"] == pytest.approx((abs(3 * sure - 2) + abs(less - 1)) / 4)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(rewards.ravel(), lengths.ravel())[0, 1])
    assert (found["accuracy_of_shorter"], found["accuracy_of_longer"]) == (0.0, 1.0)
