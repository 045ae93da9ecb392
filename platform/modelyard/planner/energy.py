"""Energy of a stretch of work: measured where the machine tells it, else estimated, and which of the two."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from modelyard.planner.hardware import Hardware

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Energy:
    """kWh of a stretch of work and its source: `rapl`, `nvml`, or `tdp` (rated power x utilisation)."""

    kwh: float
    seconds: float
    source: str


class EnergyMeter:
    """Measures the energy of a `with` block; read `result` after it.

    RAPL counters give the processor packages, NVML the GPUs; both are added when both are readable. Where
    neither is, the estimate is `hw.watts` x `devices` x `utilisation` x time.

    Args:
        hw: the device that works, for the estimate.
        devices: how many of them.
        utilisation: mean power over the rated power in the estimate.
        powercap: folder of the RAPL counters.
    """

    def __init__(self, hw: Hardware, devices: int = 1, utilisation: float = 0.9, powercap: Path = RAPL) -> None:
        self._watts = hw.watts * devices * utilisation
        self._powercap = powercap
        self._start: dict[str, tuple[int, int]] = {}
        self._gpus = 0.0
        self._began = 0.0
        self.result = Energy(0.0, 0.0, "tdp")

    def __enter__(self) -> EnergyMeter:
        self._began, self._start, self._gpus = time.monotonic(), read_rapl(self._powercap), read_nvml() or 0.0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        joules, sources = rapl_joules(self._start, read_rapl(self._powercap)), ["rapl"] if self._start else []
        gpus = read_nvml()
        if gpus is not None:
            joules += gpus - self._gpus
            sources.append("nvml")
        if not sources:
            joules, sources = self._watts * seconds, ["tdp"]
        self.result = Energy(joules / 3.6e6, seconds, "+".join(sources))


def read_rapl(folder: Path = RAPL) -> dict[str, tuple[int, int]]:
    """(microjoules now, where the counter wraps) of each readable processor package."""
    found = {}
    for package in sorted(folder.glob("intel-rapl:[0-9]*")):
        if package.name.count(":") != 1:
            continue
        try:
            now = int((package / "energy_uj").read_text())
            wrap = int((package / "max_energy_range_uj").read_text())
        except (OSError, ValueError):
            continue
        found[package.name] = (now, wrap)
    return found


def rapl_joules(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> float:
    """Joules between two readings, each counter wrapping around at most once."""
    total = 0
    for name, (start, wrap) in before.items():
        if name in after:
            end = after[name][0]
            total += end - start if end >= start else end - start + wrap
    return total / 1e6


def read_nvml() -> float | None:
    """Joules all visible NVIDIA GPUs have used since their driver was loaded; None without a GPU or NVML."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        return float(sum(nvml.nvmlDeviceGetTotalEnergyConsumption(h) for h in handles)) / 1000
    except nvml.NVMLError:
        return None
