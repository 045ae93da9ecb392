"""What the loop tells the outside: one record a step, handed to a callback that must not block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step.

    Attributes:
        step: steps done, counted from 1.
        loss: mean over the global batch (nats a target token for language models).
        learning_rate: of this step.
        grad_norm: global norm before clipping.
        seconds: wall time of this step, checkpoint and evaluation left out.
        tokens: tokens read so far.
        tokens_per_second: over the last steps, all workers.
        data_wait: share of step time spent waiting for data.
        eta: seconds to the last step.
        skipped: whether the update was left out because something was not finite.
        extra: further means the objective reports, and `heldout_loss` where it was evaluated.
        timings: now and then: mean seconds by phase, and who straggles. No part of the run's table.
    """

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    seconds: float
    tokens: int
    tokens_per_second: float
    data_wait: float
    eta: float
    skipped: bool = False
    extra: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)

    def dump(self) -> dict[str, Any]:
        """As plain JSON-able values."""
        return asdict(self)

    def series(self) -> dict[str, float]:
        """The numbers worth a curve, by name."""
        names = ("loss", "learning_rate", "grad_norm", "seconds", "tokens", "tokens_per_second", "data_wait")
        return {name: float(getattr(self, name)) for name in names} | self.extra


Sink = Callable[[StepMetrics], None]
Say = Callable[[str], None]


def no_sink(metrics: StepMetrics) -> None:
    """Drops metrics."""


def no_say(text: str) -> None:
    """Drops a message."""


class Meter:
    """Throughput and share of data wait, smoothed over about ten steps; the first step (warm-up) does not count."""

    def __init__(self, tokens_per_step: int) -> None:
        self.tokens_per_step, self._step, self._wait, self._seen = tokens_per_step, 0.0, 0.0, 0
        self.seconds, self.counted = 0.0, 0

    def update(self, seconds: float, wait: float) -> None:
        """Takes in one step: its wall time and the part of it spent waiting for data, in seconds."""
        self._seen += 1
        if self._seen > 1:
            self.seconds, self.counted = self.seconds + seconds, self.counted + 1
        keep = 0.0 if self._seen <= 2 else 0.9
        self._step = keep * self._step + (1 - keep) * seconds
        self._wait = keep * self._wait + (1 - keep) * wait

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self._step if self._step else 0.0

    @property
    def mean_tokens_per_second(self) -> float:
        """Over the whole run but its first step; the smoothed value when there was only one."""
        return self.tokens_per_step * self.counted / self.seconds if self.seconds else self.tokens_per_second

    @property
    def data_wait(self) -> float:
        return self._wait / self._step if self._step else 0.0

    def eta(self, steps_left: int) -> float:
        """Seconds until `steps_left` more steps are done."""
        return self._step * steps_left
