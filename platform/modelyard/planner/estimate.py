"""What a stage is expected to need, in one record that `plan` prints and reports compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self


@dataclass(frozen=True)
class Estimate:
    """Predicted needs of one stage; None = not known for this stage.

    `parameters` and `flops` are totals; `memory_bytes` is the peak of one worker; `seconds` is wall
    time; `cost_usd` and `energy_kwh` cover all workers.
    """

    parameters: int | None = None
    tokens: int | None = None
    flops: float | None = None
    memory_bytes: int | None = None
    seconds: float | None = None
    cost_usd: float | None = None
    energy_kwh: float | None = None
    notes: tuple[str, ...] = ()
    memory_parts: tuple[tuple[str, float], ...] = ()
    """`memory_bytes` by component, bytes."""
    basis: Mapping[str, Any] | None = None
    """What a training run was predicted from, JSON-able: `calibrate.measurement` makes a measured run of it."""

    def longer(self, seconds: float, flops: float) -> Self:
        """The same with so much more work, cost and energy in proportion to time; unchanged while time is unknown."""
        if not self.seconds:
            return self
        scale = 1 + seconds / self.seconds
        return replace(
            self,
            flops=(self.flops or 0.0) + flops,
            seconds=self.seconds + seconds,
            cost_usd=None if self.cost_usd is None else self.cost_usd * scale,
            energy_kwh=None if self.energy_kwh is None else self.energy_kwh * scale,
        )
