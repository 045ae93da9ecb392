"""Energy of a stretch of work: measured where the machine tells it, else estimated, and which of the two."""

from __future__ import annotations

import importlib
import os
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
    """kWh of a stretch of work and its source: `rapl`, `nvml`, both, or `tdp x 0.85` (rated power x utilisation)."""

    kwh: float
    seconds: float
    source: str


class EnergyMeter:
    """Measures the energy of a `with` block; read `result` after it.

    RAPL counters give the processor packages, NVML the GPUs; both are added when both are readable and each
    counted by the share of the machine that the work holds. Where neither is, the estimate is
    `hw.watts` x `devices` x utilisation x time.

    Args:
        hw: the device that works, for the estimate.
        devices: how many of them; a part of one is a number below 1.
        utilisation: mean power over the rated power in the estimate; None = the busy time of this machine's
            cores over that of `devices` cores, at most 1.
        share: part of the machine's counters that is this work's, 0..1.
        here: whether the work runs on this machine; its counters say nothing about another one.
        powercap: folder of the RAPL counters.
    """

    def __init__(
        self, hw: Hardware, devices: float = 1, utilisation: float | None = 0.9, *, share: float = 1.0,
        here: bool = True, powercap: Path = RAPL,
    ) -> None:  # fmt: skip
        self._watts, self._devices, self._utilisation = hw.watts * devices, devices, utilisation
        self._share, self._here, self._powercap = share, here, powercap
        self._start: dict[str, tuple[int, int]] = {}
        self._gpus: float | None = None
        self._began = self._busy = 0.0
        self.result = Energy(0.0, 0.0, "tdp")

    def __enter__(self) -> EnergyMeter:
        self._began, self._busy = time.monotonic(), busy_core_seconds()
        if self._here:
            self._start, self._gpus = read_rapl(self._powercap), read_nvml()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.monotonic() - self._began
        joules, sources = rapl_joules(self._start, read_rapl(self._powercap)), ["rapl"] if self._start else []
        gpus = read_nvml() if self._gpus is not None else None
        if gpus is not None and self._gpus is not None:
            joules += gpus - self._gpus
            sources.append("nvml")
        joules *= self._share
        if not sources:
            utilisation = self._utilisation if self._utilisation is not None else self._measured(seconds)
            joules, sources = self._watts * utilisation * seconds, [f"tdp x {utilisation:.2f}"]
        self.result = Energy(joules / 3.6e6, seconds, "+".join(sources))

    def _measured(self, seconds: float) -> float:
        busy = busy_core_seconds() - self._busy
        return min(busy / (self._devices * seconds), 1.0) if seconds > 0 and busy > 0 else 0.9


def busy_core_seconds() -> float:
    """Seconds all cores of this machine have computed since it started; 0 where /proc does not tell."""
    try:
        fields = Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system = (float(value) for value in fields[:3])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


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


def gpu_name() -> str | None:
    """What NVML calls the first GPU of this machine; None without a GPU or NVML."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
        name = nvml.nvmlDeviceGetName(nvml.nvmlDeviceGetHandleByIndex(0))
    except nvml.NVMLError:
        return None
    return name.decode() if isinstance(name, bytes) else str(name)


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
