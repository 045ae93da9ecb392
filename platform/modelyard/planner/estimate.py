"""What a stage is expected to need, in one record that `plan` prints and reports compare with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


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
