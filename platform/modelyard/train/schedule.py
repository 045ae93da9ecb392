"""Learning-rate schedules: pure functions of the step, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from modelyard.train.options import TrainOptions

Schedule = Callable[[int], float]
"""From a step (0-based) to the factor that multiplies the peak rate."""

_WSD_DECAY = 0.2
"""Share of the run over which warm-up-stable-decay goes down (MiniCPM, arXiv 2404.06395: 10 to 20 %)."""

_LOW = 1 / 25
"""Where one-cycle begins, as a share of the peak (torch and fastai: 1/25)."""


def make_schedule(options: TrainOptions, steps: int) -> Schedule:
    """The schedule `options` ask for over `steps` optimizer steps.

    The factor rises linearly to 1 at the last warm-up step and ends at `options.floor`.
    """
    warmup = options.warmup_steps(steps)
    if options.schedule == "one-cycle":
        return _one_cycle(warmup, steps, options.floor)
    decay = {"cosine": _cosine, "linear": _linear, "wsd": _wsd, "constant": _constant}[options.schedule]

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
        return options.floor + (1 - options.floor) * decay(progress)

    return factor


def _one_cycle(warmup: int, steps: int, floor: float) -> Schedule:
    """Up along a cosine from `_LOW`, down along one to `floor` (Smith and Topin 2017, arXiv 1708.07120)."""
    top = max(warmup - 1, 0)

    def factor(step: int) -> float:
        if step < top:
            return 1 - (1 - _LOW) * _cosine(step / top)
        return floor + (1 - floor) * _cosine(min(1.0, (step - top) / max(1, steps - 1 - top)))

    return factor


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


def _wsd(progress: float) -> float:
    return min(1.0, (1 - progress) / _WSD_DECAY)


def _constant(progress: float) -> float:
    return 1.0
