"""Preference losses: the papers' formulas as functions of log-probabilities of whole answers.

All tensors are [pairs], fp32; log-probabilities are natural and summed over an answer's tokens unless said otherwise.
Each function returns one loss a pair, for the caller to average.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dpo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, smoothing: float = 0.0) -> torch.Tensor:
    """Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    `chosen` and `rejected` are log-ratios: policy minus reference. `smoothing` > 0 is the conservative form (Mitchell
    2023): that share of the labels is taken to be wrong.
    """
    margin = beta * (chosen - rejected)
    return -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing


def ipo(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """Identity preference optimization (Azar et al. 2023, arXiv 2310.12036, equation 17); `beta` is its tau.

    `chosen` and `rejected` are log-ratios a token: policy minus reference, divided by the answer's length.
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def kto(
    ratio: torch.Tensor, liked: torch.Tensor, baseline: torch.Tensor, beta: float, desirable: float, undesirable: float
) -> torch.Tensor:
    """Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306, equation 8).

    Args:
        ratio: log-ratio of each answer, policy minus reference.
        liked: bool, whether the answer was liked.
        baseline: scalar, the reference point: an estimate of the KL divergence, at least 0, without gradient.
        beta: strength.
        desirable: weight of liked answers.
        undesirable: weight of the others.
    """
    gain = beta * torch.where(liked, ratio - baseline, baseline - ratio)
    weight = torch.where(liked, desirable, undesirable)
    return weight * (1 - torch.sigmoid(gain))


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, likelihood: torch.Tensor, beta: float) -> torch.Tensor:
    """Odds-ratio preference optimization (Hong et al. 2024, arXiv 2403.07691, equations 6 and 7).

    `chosen` and `rejected` are mean log-probabilities a token, `likelihood` the chosen answer's cross-entropy a token.
    """
    odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return likelihood - beta * F.logsigmoid(odds)


def simpo(
    chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float, smoothing: float = 0.0
) -> torch.Tensor:
    """Simple preference optimization (Meng et al. 2024, arXiv 2405.14734, equation 6); no reference.

    `chosen` and `rejected` are mean log-probabilities a token; `gamma` is the target margin of rewards.
    """
    margin = beta * (chosen - rejected) - gamma
    return -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing


def bradley_terry(
    chosen: torch.Tensor, rejected: torch.Tensor, margin: torch.Tensor | None = None, center: float = 0.0
) -> torch.Tensor:
    """Reward modelling by pairs (Bradley and Terry 1952; margin: Llama 2, arXiv 2307.09288, equation 2).

    `chosen` and `rejected` are rewards. `center` > 0 pulls the sum of both to 0 (Eisenstein et al. 2023, arXiv
    2312.09244).
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + center * (chosen + rejected) ** 2


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Maechler 2012); at 0 the smallest number it can hold."""
    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    # Both branches are computed: what the other one gets must not make its gradient infinite.
    near = x > -0.6931472
    small = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, x)))
    return torch.where(near, small, large)
