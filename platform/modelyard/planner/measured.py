"""Predicted against measured: the rows a report shows after a run, so that the cost model can be trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from modelyard.planner import formatting as fmt
from modelyard.planner.estimate import Estimate


@dataclass(frozen=True)
class Difference:
    """One quantity: predicted, measured, and predicted / measured - 1."""

    name: str
    predicted: float
    measured: float
    unit: Callable[[float | None], str]

    @property
    def error(self) -> float:
        """Relative error of the prediction."""
        return self.predicted / self.measured - 1

    def row(self) -> tuple[str, str, str, str]:
        """(name, predicted, measured, error) as text."""
        return self.name, self.unit(self.predicted), self.unit(self.measured), f"{self.error:+.0%}"


def compare(
    estimate: Estimate, *, seconds: float | None = None, memory_bytes: float | None = None,
    tokens_per_second: float | None = None, energy_kwh: float | None = None,
) -> list[Difference]:  # fmt: skip
    """Rows for what is both predicted and measured (measured values above zero).

    Args:
        estimate: what was predicted.
        seconds: measured wall time of training.
        memory_bytes: measured peak of one worker.
        tokens_per_second: measured over all workers.
        energy_kwh: measured energy.
    """
    speed = estimate.tokens / estimate.seconds if estimate.tokens and estimate.seconds else None
    pairs = [
        ("wall time", estimate.seconds, seconds, fmt.duration),
        ("peak memory of a worker", estimate.memory_bytes, memory_bytes, fmt.size),
        ("tokens a second", speed, tokens_per_second, fmt.number),
        ("energy", estimate.energy_kwh, energy_kwh, fmt.energy),
    ]
    return [Difference(name, float(a), float(b), unit) for name, a, b, unit in pairs if a and b]
