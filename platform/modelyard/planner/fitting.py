"""Fits of the parametric law to runs (approach 3): Huber on logarithms, L-BFGS from a grid, bootstrap intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from modelyard.errors import DataError
from modelyard.planner.scaling import Chinchilla, Run

Floats = NDArray[np.float64]
DELTA = 1e-3
"""Huber's threshold on log-loss residuals, as in the paper."""
_GRID = list(
    itertools.product((0.0, 5.0, 10.0, 15.0, 20.0, 25.0), (0.0, 5.0, 10.0, 15.0, 20.0, 25.0),
                      (-1.0, -0.5, 0.0, 0.5, 1.0), (0.0, 0.5, 1.0, 1.5, 2.0), (0.0, 0.5, 1.0, 1.5, 2.0))
)  # fmt: skip
"""The paper's grid of starts: a, b, e, alpha, beta."""
_BOUNDS = [(None, None)] * 3 + [(0.0, 3.0)] * 2
"""Exponents a law can have (published ones: 0.05 to 0.5); noise of small runs otherwise gives any."""
_SEEN = 0.01
"""Nats by which a law must fall over the sizes (or tokens) of its runs to say anything about more of them."""


@dataclass(frozen=True)
class Fit:
    """A fitted law, the laws of bootstrap resamples, and the mean Huber loss reached.

    `falls` is how far the law's terms of parameters and of tokens fall from the smallest to the largest run, nats.
    """

    law: Chinchilla
    resamples: tuple[Chinchilla, ...]
    objective: float
    runs: int
    falls: tuple[float, float]

    def interval(self, name: str, level: float = 0.8) -> tuple[float, float]:
        """Interval of a coefficient (`E`, `A`, `B`, `alpha`, `beta`) over the resamples."""
        return _interval([getattr(law, name) for law in self.resamples], level)

    def predict(self, parameters: float, tokens: float, level: float = 0.8) -> tuple[float, float, float]:
        """Predicted loss with the low and high end of its interval."""
        middle = self.law.loss(parameters, tokens)
        low, high = _interval([law.loss(parameters, tokens) for law in self.resamples] or [middle], level)
        return middle, min(low, middle), max(high, middle)

    @property
    def unseen(self) -> tuple[str, ...]:
        """Which of parameters and tokens these runs do not show to lower the loss."""
        found = zip(("parameters", "tokens"), self.falls, strict=True)
        return tuple(name for name, fall in found if fall < _SEEN)

    def rows(self, level: float = 0.8) -> list[tuple[str, float, float, float]]:
        """(coefficient, value, low, high) for tables."""
        return [(n, float(getattr(self.law, n)), *self.interval(n, level)) for n in ("E", "A", "B", "alpha", "beta")]


def _interval(values: Sequence[float], level: float) -> tuple[float, float]:
    if not values:
        return math.nan, math.nan
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _objective(theta: Floats, n: Floats, d: Floats, y: Floats) -> tuple[float, Floats]:
    """Mean Huber loss of log-sum-exp(a - alpha log N, b - beta log D, e) - log L, and its gradient."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
    top = terms.max(axis=0)
    weights = np.exp(terms - top)
    total = weights.sum(axis=0)
    residual = top + np.log(total) - y
    weights = weights / total
    small = np.abs(residual) <= DELTA
    loss = np.where(small, 0.5 * residual**2, DELTA * (np.abs(residual) - 0.5 * DELTA))
    slope = np.where(small, residual, DELTA * np.sign(residual)) / len(y)
    gradient = np.array([
        (slope * weights[0]).sum(), (slope * weights[1]).sum(), (slope * weights[2]).sum(),
        -(slope * weights[0] * n).sum(), -(slope * weights[1] * d).sum(),
    ])  # fmt: skip
    # Scaled so that the optimiser's tolerances, made for losses near one, do not stop early.
    return float(loss.mean()) / DELTA**2, gradient / DELTA**2


def _minimise(start: Floats, n: Floats, d: Floats, y: Floats, tolerance: float = 1e-15) -> tuple[float, Floats]:
    from scipy.optimize import minimize

    found = minimize(
        _objective, start, args=(n, d, y), jac=True, method="L-BFGS-B", bounds=_BOUNDS,
        options={"maxiter": 3000, "maxfun": 6000, "ftol": tolerance, "gtol": 1e-12},
    )  # fmt: skip
    return float(found.fun), np.asarray(found.x, float)


def fit(runs: Sequence[Run], *, bootstrap: int = 100, starts: int = 8, seed: int = 0) -> Fit:
    """Fits L = E + A / N^alpha + B / D^beta to runs.

    Args:
        runs: finished runs; sizes and tokens must both vary.
        bootstrap: resamples of the runs for the intervals; 0 = none.
        starts: L-BFGS runs, from the best points of the paper's grid of 4500.
        seed: of the resampling.

    Raises:
        DataError: fewer than six runs, one size or one number of tokens only, or a value that is not positive.
    """
    _check(runs)
    n, d, y = (np.log([getattr(r, k) for r in runs]) for k in ("parameters", "tokens", "loss"))
    grid = np.array(_GRID)
    values = np.array([_objective(theta, n, d, y)[0] for theta in grid])
    value, theta = min((_minimise(grid[i], n, d, y) for i in np.argsort(values)[:starts]), key=lambda found: found[0])
    generator = np.random.default_rng(seed)
    resamples = []
    for _ in range(bootstrap):
        chosen = generator.integers(0, len(runs), len(runs))
        if len(np.unique(n[chosen])) > 1 and len(np.unique(d[chosen])) > 1:
            resamples.append(_law(_minimise(theta, n[chosen], d[chosen], y[chosen], 1e-12)[1]))
    a, b, _, alpha, beta = theta
    falls = (_fall(a, alpha, n), _fall(b, beta, d))
    return Fit(_law(theta), tuple(resamples), value * DELTA**2, len(runs), falls)


def _fall(log_factor: float, exponent: float, logs: Floats) -> float:
    ends = np.exp(log_factor - exponent * np.array([logs.min(), logs.max()]))
    return float(ends[0] - ends[1])


def _law(theta: Floats) -> Chinchilla:
    a, b, e, alpha, beta = (float(v) for v in theta)
    return Chinchilla(E=math.exp(e), A=math.exp(a), B=math.exp(b), alpha=alpha, beta=beta)


def _check(runs: Sequence[Run]) -> None:
    if len(runs) < 6:
        raise DataError(f"{len(runs)} runs for five coefficients", place="runs", mend="give six runs or more")
    for run in runs:
        if not (run.parameters > 0 and run.tokens > 0 and run.loss > 0 and math.isfinite(run.loss)):
            raise DataError(f"a run with {run}", place="runs", mend="parameters, tokens and loss must be above zero")
    for what in ("parameters", "tokens"):
        if len({getattr(run, what) for run in runs}) < 2:
            raise DataError(f"all runs have the same {what}", place="runs", mend=f"give runs that differ in {what}")


@dataclass(frozen=True)
class Advice:
    """Whether to go on: the loss now, after twice and four times the tokens, and where the curve is heading."""

    loss: float
    doubled: float
    quadrupled: float
    floor: float
    stop: bool
    text: str


def advise(points: Sequence[tuple[float, float]], *, worth: float = 0.01) -> Advice:
    """Early-stopping advice from one run's (tokens, held-out loss) points.

    Fits L = floor + k D^-b to the later half of the points (three exponents' worth of curve is more than a
    run in its warm-up shows) and says what the next doubling buys.

    Args:
        points: (tokens, loss), tokens rising, from after the warm-up.
        worth: fall of the loss, nats, below which another doubling is not worth its price.

    Raises:
        DataError: fewer than five points, or tokens that do not rise.
    """
    if len(points) < 5:
        raise DataError(f"{len(points)} points of a loss curve", place="points", mend="give five or more")
    x, y = np.array([p[0] for p in points], float), np.array([p[1] for p in points], float)
    if not (np.diff(x) > 0).all() or x[0] <= 0:
        raise DataError("tokens do not rise", place="points", mend="sort the points by tokens, all above zero")
    half = max(len(points) // 2, 5)
    floor, k, b = _tail(x[-half:], y[-half:])
    now, twice, four = (floor + k * (x[-1] * m) ** -b for m in (1, 2, 4))
    gain = now - twice
    rising = y[-1] > y.min() + worth and int(np.argmin(y)) < len(y) - 2
    text = f"the next doubling buys {max(gain, 0):.2g} nats (loss {now:.3f} to {twice:.3f})"
    if rising:
        text = f"the held-out loss has risen from {y.min():.3f} to {y[-1]:.3f}: keep the checkpoint of its minimum"
    stop = rising or gain < worth
    text += "; stop" if stop else "; go on"
    return Advice(float(now), float(twice), float(four), float(floor), bool(stop), text)


def _tail(x: Floats, y: Floats) -> tuple[float, float, float]:
    """(floor, k, exponent) with the least squared error; floor and k are linear once the exponent is chosen."""
    best = (math.inf, float(y[-1]), 0.0, 0.5)
    for b in np.linspace(0.05, 1.5, 59):
        basis = np.stack([np.ones_like(x), (x / x[-1]) ** -b], axis=1)
        (floor, k), *_ = np.linalg.lstsq(basis, y, rcond=None)
        if floor < 0:
            floor, k = 0.0, float((basis[:, 1] * y).sum() / (basis[:, 1] ** 2).sum())
        error = float(((basis @ np.array([floor, k]) - y) ** 2).sum())
        if error < best[0] and k >= 0:
            best = (error, float(floor), float(k * x[-1] ** b), float(b))
    return best[1:]
