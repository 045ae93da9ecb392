"""What a stage spends: energy, money and emissions, beside what was predicted. The runner logs it in MLflow."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING

from modelyard.planner.cost import carbon_intensity, price
from modelyard.planner.energy import Energy, EnergyMeter
from modelyard.planner.estimate import Estimate
from modelyard.planner.hardware import Hardware, find_gpu, find_hardware, this_machine
from modelyard.recipe.schema import Resources

if TYPE_CHECKING:
    from modelyard.tracking import Run


class Spending:
    """Meters a `with` block; `metrics` and `tags` after it.

    Args:
        resources: of the stage; `hardware` names the device that is paid for.
        demand: CPUs and GPUs the stage holds.
        here: whether its workers run on this machine, whose counters may then be read.
    """

    def __init__(self, resources: Resources, demand: Mapping[str, float], here: bool) -> None:
        self._resources, self._stack = resources, ExitStack()
        gpus, cpus = demand.get("GPU", 0.0), demand.get("CPU", 1.0)
        self._hw, self._devices = _device(resources, gpus, cpus)
        cores = max(os.cpu_count() or 1, 1)
        self._meter = EnergyMeter(
            self._hw, self._devices, None if here and not gpus else 0.9, here=here, share=min(max(cpus, 1) / cores, 1.0)
        )

    def __enter__(self) -> Spending:
        self._stack.enter_context(self._meter)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def energy(self) -> Energy:
        """What was metered."""
        return self._meter.result

    def metrics(self) -> dict[str, float]:
        """`energy_kwh`, `co2e_kg`, `device_hours` and, for a device with a price, `cost_usd`."""
        hours = self._devices * self.energy.seconds / 3600
        found = {
            "energy_kwh": self.energy.kwh, "device_hours": hours,
            "co2e_kg": self.energy.kwh * carbon_intensity(self._resources.region) / 1000,
        }  # fmt: skip
        rate = price(self._hw)
        return found if rate is None else found | {"cost_usd": rate * hours}

    def tags(self) -> dict[str, str]:
        """Where the energy figure comes from, what was paid for and on which grid."""
        return {
            "modelyard.energy_source": self.energy.source,
            "modelyard.device": f"{self._devices:g} x {self._hw.name}",
            "modelyard.grid": self._resources.region,
        }


def _device(resources: Resources, gpus: float, cpus: float) -> tuple[Hardware, float]:
    """What is paid for and how much of it: the GPUs where there are some, else the cores."""
    if gpus:
        named = find_hardware(resources.hardware) if resources.hardware else find_gpu()
        return (named, gpus) if named is not None and named.kind != "cpu" else (this_machine(), max(cpus, 1.0))
    return this_machine(), max(cpus, 1.0)


def log_prediction(run: Run, estimate: Estimate) -> None:
    """Puts what was predicted into the run, so that it can be compared with what comes and calibrated from."""
    from json import dumps

    names = ("seconds", "memory_bytes", "cost_usd", "energy_kwh", "flops")
    values = {f"predicted_{name}": getattr(estimate, name) for name in names}
    run.log_metrics({name: float(value) for name, value in values.items() if value is not None})
    if estimate.basis is not None:
        run.set_tags({"modelyard.basis": dumps(estimate.basis, separators=(",", ":"))})
