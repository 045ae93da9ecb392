"""Devices and their peaks: a table in `data/hardware.yaml`, rows of one's own, and this machine's processor."""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from modelyard.errors import RecipeError

THIS_MACHINE = "this-machine"
GB = 1_000_000_000
_CYCLE = {"avx512f": 64, "avx2": 32, "asimd": 16, "avx": 16}
"""fp32 operations a cycle and core, an upper bound: two units of the widest vectors. `calibrate` finds the rest."""


@dataclass(frozen=True)
class Hardware:
    """One kind of device; a CPU device is one core when it is this machine, one socket in the table.

    Attributes:
        name: name in the table.
        kind: `gpu`, `tpu` or `cpu`.
        peak: FLOP/s by dtype, dense.
        memory: bytes.
        bandwidth: memory bytes a second.
        watts: thermal design power.
        node: devices a node.
        intra: bytes a second one device sends inside its node.
        inter: bytes a second one device sends between nodes.
        efficiency: share of the peak that training reaches; `calibrate` replaces it.
        cores: of a CPU.
        source: where the figures come from.
    """

    name: str
    kind: str
    peak: Mapping[str, float]
    memory: float
    bandwidth: float
    watts: float
    node: int
    intra: float
    inter: float
    efficiency: float
    cores: int = 0
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def flops(self, dtype: str) -> float:
        """Peak FLOP/s in `dtype` (`fp32`, `tf32`, `bf16`, `fp16`, `fp8`, `int8`, `fp4`).

        Raises:
            RecipeError: the device has no such arithmetic.
        """
        if dtype not in self.peak:
            raise RecipeError(
                f"{self.name} has no {dtype} arithmetic", place="hardware", mend="use " + ", ".join(sorted(self.peak))
            )
        return self.peak[dtype]

    def calibrated(self, efficiency: float) -> Hardware:
        """The same device with a measured efficiency."""
        return replace(self, efficiency=efficiency)


def load_table(name: str, path: str | Path | None = None) -> dict[str, Any]:
    """Reads `data/{name}.yaml`; a file at `path` is merged over it, row by row."""
    text = resources.files("modelyard.planner").joinpath("data", f"{name}.yaml").read_text("utf-8")
    table: dict[str, Any] = yaml.safe_load(text)
    if path is not None:
        for key, value in (yaml.safe_load(Path(path).read_text("utf-8")) or {}).items():
            merged = isinstance(value, Mapping) and isinstance(table.get(key), dict)
            table[key] = {**table[key], **value} if merged else value
    return table


@functools.cache
def _devices() -> dict[str, Any]:
    return load_table("hardware")


def names() -> list[str]:
    """Every name `find_hardware` accepts."""
    table = _devices()
    return sorted([*table["devices"], *table["aliases"], THIS_MACHINE])


def find_hardware(name: str | Hardware | None = None, *, path: str | Path | None = None) -> Hardware:
    """Looks a device up.

    Args:
        name: a name in the table (case and spaces do not matter), an own `Hardware`, or None for this machine.
        path: a YAML file of the table's form whose rows add to or replace it.

    Raises:
        RecipeError: unknown name; says the nearest one.
    """
    if isinstance(name, Hardware):
        return name
    table = load_table("hardware", path) if path else _devices()
    key = (name or THIS_MACHINE).strip().lower().replace(" ", "-").replace("_", "-")
    key = table["aliases"].get(key, key)
    if key == THIS_MACHINE:
        return this_machine()
    if key not in table["devices"]:
        known = sorted([*table["devices"], *table["aliases"], THIS_MACHINE])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"unknown hardware {name!r}", place="hardware", mend=hint + "known: " + ", ".join(known))
    return _row(key, table["devices"][key])


def find_gpu(reported: str | None = None) -> Hardware | None:
    """The table's row of a GPU by the name its driver reports (`NVIDIA H100 80GB HBM3`); None = unknown or none here.

    Args:
        reported: the driver's name; None = ask NVML for the first GPU of this machine.
    """
    from modelyard.planner.energy import gpu_name

    name = (reported or gpu_name() or "").lower().replace("-", " ")
    memory = next((word for word in name.split() if word.endswith("gb")), "")
    fitting = [key for key in _devices()["devices"] if key.split("-")[0] in name.split()]
    best = [key for key in fitting if memory and memory in key] or fitting
    return find_hardware(best[-1]) if best else None


def _row(name: str, row: Mapping[str, Any]) -> Hardware:
    peak = {dtype: value * 1e12 for dtype, value in row["peak"].items()}
    if row["kind"] == "cpu" and not peak:
        peak = _cpu_peak(row["cores"], row["ghz"] * 1e9, row["flops_per_cycle"])
    return Hardware(
        name=name, kind=row["kind"], peak=peak, memory=row["memory"] * GB, bandwidth=row["bandwidth"] * GB,
        watts=row["watts"], node=row["node"], intra=row["intra"] * GB, inter=row["inter"] * GB,
        efficiency=row["efficiency"], cores=row.get("cores", 0), source=row.get("source", ""),
    )  # fmt: skip


def _cpu_peak(cores: float, hertz: float, per_cycle: float) -> dict[str, float]:
    """fp32 peak; bf16 is emulated on most processors, so it is not faster; int8 dot products do four times."""
    fp32 = cores * hertz * per_cycle
    return {"fp32": fp32, "bf16": fp32, "int8": 4 * fp32}


@functools.cache
def this_machine() -> Hardware:
    """One core of this machine as a device; its peak from the processor's flags and clock, its share of the RAM."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    flags, hertz = _cpuinfo()
    per_cycle = next((value for flag, value in _CYCLE.items() if flag in flags), 8)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Hardware(
        name=THIS_MACHINE, kind="cpu", peak=_cpu_peak(1, hertz, per_cycle), memory=float(pages), bandwidth=10.0 * GB,
        watts=8.0, node=cores, intra=4.0 * GB, inter=1.25 * GB, efficiency=0.6, cores=1,
        source=f"{cores} cores, {hertz / 1e9:.2f} GHz, {per_cycle} fp32 operations a cycle from the processor's flags",
    )  # fmt: skip


def _cpuinfo() -> tuple[set[str], float]:
    """Instruction-set flags and clock (Hz) from /proc/cpuinfo; a modest guess where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return {"asimd"}, 2.5e9
    flags: set[str] = set()
    hertz = 0.0
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            flags.update(value.split())
        elif key.strip() == "cpu MHz":
            hertz = max(hertz, float(value) * 1e6)
    return flags, hertz or 2.5e9
