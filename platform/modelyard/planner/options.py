"""The same training run on other hardware and device counts: what time costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.errors import RecipeError
from modelyard.planner.choose import plain_layout
from modelyard.planner.cost import Cost, cost
from modelyard.planner.hardware import find_hardware
from modelyard.planner.layout import Layout
from modelyard.planner.time import check_positive, step_time

LEAST_STEPS = 100
"""Optimizer steps a run should at least have before more devices are offered for it."""


@dataclass(frozen=True)
class Option:
    """A run on `devices` x `hardware`: its layout, wall hours and cost."""

    hardware: str
    devices: int
    layout: Layout
    hours: float
    cost: Cost


def options(
    config: Mapping[str, Any], tokens: float, sequence_length: int, *,
    hardware: Sequence[str] = ("a100", "h100", "h200", "b200", "mi300x"), devices: Sequence[int] = (1, 8, 64, 512),
    precision_name: str = "mixed", region: str = "world",
) -> list[Option]:  # fmt: skip
    """Every combination that fits under plain FSDP, fastest first; those that do not fit or have no work are left out.

    Args:
        config: Hugging Face config.
        tokens: tokens trained on.
        sequence_length: tokens a sequence.
        hardware: names in the hardware table.
        devices: device counts.
        precision_name: see `precision.PRECISIONS`.
        region: grid region, for the emissions.

    Raises:
        RecipeError: bad config, unknown hardware or region, or tokens that are not positive.
    """
    check_positive(tokens=tokens, sequence_length=sequence_length)
    found = []
    for name in hardware:
        hw = find_hardware(name)
        for number in devices:
            try:
                layout = plain_layout(config, hw, number, sequence_length, precision_name)
            except RecipeError:
                continue  # Does not fit: not an option, and no mistake of the user's.
            batch = 16 * number
            if number > 1 and tokens < LEAST_STEPS * batch * sequence_length:
                continue  # More devices would only make the steps fewer.
            step = step_time(
                config, sequence_length=sequence_length, global_batch=batch, hardware=hw, layout=layout,
                precision_name=precision_name,
            )  # fmt: skip
            hours = step.seconds * tokens / (batch * sequence_length) / 3600
            found.append(Option(hw.name, number, layout, hours, cost(hours, number, hw, region=region)))
    return sorted(found, key=lambda option: option.hours)
