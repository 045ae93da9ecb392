"""Scaling laws: loss as a function of parameters and tokens, what a budget buys, and fits to one's own runs.

Forms: Hoffmann et al. (arXiv 2203.15556), L = E + A / N^alpha + B / D^beta, and Kaplan et al. (arXiv
2001.08361), L = [(Nc / N)^(aN / aD) + Dc / D]^aD. N are parameters, D tokens, C = 6 N D FLOPs, losses nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import DataError
from modelyard.planner.time import check_positive

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Run:
    """One finished run: parameters, tokens, final (held-out) loss in nats a token."""

    parameters: float
    tokens: float
    loss: float

    @property
    def flops(self) -> float:
        """6 N D."""
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class Chinchilla:
    """L = E + A / N^alpha + B / D^beta. The defaults are Hoffmann et al.'s published fit (their approach 3)."""

    E: float = 1.69
    A: float = 406.4
    B: float = 410.7
    alpha: float = 0.34
    beta: float = 0.28

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss, nats."""
        return float(self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta)

    @property
    def exponents(self) -> tuple[float, float]:
        """(a, b) of N_opt ~ C^a and D_opt ~ C^b."""
        whole = self.alpha + self.beta
        return self.beta / whole, self.alpha / whole

    def optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss for `flops` = 6 N D (equation 4 of the paper)."""
        check_positive(flops=flops)
        a, b = self.exponents
        g = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return g * (flops / 6) ** a, (flops / 6) ** b / g


@dataclass(frozen=True)
class Kaplan:
    """L = [(Nc / N)^(alpha_n / alpha_d) + Dc / D]^alpha_d, N without embeddings; defaults as published."""

    Nc: float = 6.4e13
    Dc: float = 1.8e13
    alpha_n: float = 0.076
    alpha_d: float = 0.103

    def loss(self, parameters: float, tokens: float) -> float:
        """Predicted loss, nats."""
        return float(((self.Nc / parameters) ** (self.alpha_n / self.alpha_d) + self.Dc / tokens) ** self.alpha_d)

    def optimal(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with the lowest loss for `flops` = 6 N D, by golden section."""
        check_positive(flops=flops)
        low, high = math.log(1e3), math.log(flops / 6 / 1e3)
        ratio = (math.sqrt(5) - 1) / 2
        for _ in range(200):
            left, right = high - ratio * (high - low), low + ratio * (high - low)
            better = self.loss(math.exp(left), flops / 6 / math.exp(left)) < self.loss(
                math.exp(right), flops / 6 / math.exp(right)
            )
            low, high = (low, right) if better else (left, high)
        n = math.exp((low + high) / 2)
        return n, flops / 6 / n


Law = Chinchilla | Kaplan


@dataclass(frozen=True)
class Point:
    """One point of the curve of diminishing returns: a compute-optimal model and what the next doubling buys."""

    flops: float
    parameters: float
    tokens: float
    loss: float
    next_doubling: float


def returns(law: Law, flops: Sequence[float]) -> list[Point]:
    """Compute-optimal models for each budget, and by how much the loss falls for twice the FLOPs."""
    points = []
    for budget in flops:
        n, d = law.optimal(budget)
        loss = law.loss(n, d)
        points.append(Point(budget, n, d, loss, loss - law.loss(*law.optimal(2 * budget))))
    return points


def more_tokens(law: Law, parameters: float, tokens: float) -> float:
    """By how much the loss falls when the same model sees twice the tokens."""
    return law.loss(parameters, tokens) - law.loss(parameters, 2 * tokens)


def power_law(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(k, exponent) of y = k x^exponent by least squares on logarithms."""
    exponent, intercept = np.polyfit(np.log(np.asarray(x, float)), np.log(np.asarray(y, float)), 1)
    return float(np.exp(intercept)), float(exponent)


def envelope(curves: Sequence[tuple[float, Sequence[tuple[float, float]]]], points: int = 200) -> tuple[float, float]:
    """Approach 1 of Hoffmann et al.: the lowest loss over all training curves at each number of FLOPs.

    Args:
        curves: (parameters, [(tokens, loss), ...]) a run, tokens rising.
        points: FLOP budgets looked at, evenly spaced in the logarithm.

    Returns:
        (a, b): exponents of N_opt ~ C^a and D_opt ~ C^b.

    Raises:
        DataError: fewer than three curves.
    """
    if len(curves) < 3:
        raise DataError(f"{len(curves)} training curves", place="runs", mend="give three or more model sizes")
    logs = [
        (n, np.log([6 * n * tokens for tokens, _ in curve]), np.array([loss for _, loss in curve]))
        for n, curve in curves
    ]
    grid = np.linspace(min(x[0] for _, x, _ in logs), max(x[-1] for _, x, _ in logs), points)
    best = []
    for budget in grid:
        at = [(float(np.interp(budget, x, y)), n) for n, x, y in logs if x[0] <= budget <= x[-1]]
        if len(at) > 1:
            winner = min(at)[1]
            # The smallest and largest model of those that reach this budget tell only a bound.
            if winner not in (min(n for _, n in at), max(n for _, n in at)):
                best.append((math.exp(budget), winner))
    if len({n for _, n in best}) < 2:
        raise DataError("no two model sizes are best anywhere", place="runs", mend="give curves whose FLOPs overlap")
    _, a = power_law([c for c, _ in best], [n for _, n in best])
    return a, 1 - a


def isoflop(runs: Sequence[Run], tolerance: float = 0.05) -> tuple[float, float]:
    """Approach 2: a parabola of loss over log N at each FLOP budget, then a power law through the minima.

    Args:
        runs: runs grouped by equal FLOPs (within `tolerance`), three or more sizes a budget.
        tolerance: relative difference of FLOPs that counts as equal.

    Returns:
        (a, b) as in `envelope`.

    Raises:
        DataError: fewer than two budgets have three sizes and a minimum inside.
    """
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda r: r.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(run)
        else:
            groups.append([run])
    minima = []
    for group in groups:
        if len({run.parameters for run in group}) < 3:
            continue
        logs = np.log([run.parameters for run in group])
        square, slope, _ = np.polyfit(logs, [run.loss for run in group], 2)
        if square > 0:
            minima.append((group[0].flops, math.exp(-slope / (2 * square))))
    if len(minima) < 2:
        raise DataError(
            f"{len(minima)} FLOP budgets have a minimum", place="runs", mend="give two budgets with three sizes each"
        )
    _, a = power_law([c for c, _ in minima], [n for _, n in minima])
    return a, 1 - a
