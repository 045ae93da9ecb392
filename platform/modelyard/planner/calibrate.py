"""Calibration: the efficiency and effective bandwidth of a cluster from steps that were measured on it.

Step time is linear in the two unknowns: FLOPs x (1 / efficiency) + bytes x (1 / bandwidth). With one kind
of run only the efficiency is fitted; with several, both. Least squares on relative errors.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from modelyard.errors import DataError
from modelyard.planner.architecture import parse
from modelyard.planner.hardware import Hardware
from modelyard.planner.layout import Layout
from modelyard.planner.precision import precision
from modelyard.planner.time import bubble, communication, peak_flops, step_time, work


@dataclass(frozen=True)
class Measurement:
    """One measured run: what it trained, how it was cut, and the median seconds of an optimizer step."""

    config: Mapping[str, Any]
    sequence_length: int
    global_batch: int
    seconds: float
    layout: Layout = Layout()  # noqa: RUF009 - frozen
    precision_name: str = "fp32"
    trainable: float = 1.0


def measurement(basis: Mapping[str, Any], seconds: float) -> Measurement:
    """A measured run from what it was predicted from (`Estimate.basis`) and its seconds an optimizer step.

    Raises:
        DataError: the basis lacks a key, or names a layout this version does not know.
    """
    try:
        return Measurement(
            basis["config"], int(basis["sequence_length"]), int(basis["global_batch"]), seconds,
            Layout(**basis["layout"]), basis["precision"], float(basis["trainable"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not the basis of a prediction: {error!r}", place="basis", mend="leave the run out") from error


@dataclass(frozen=True)
class Calibration:
    """The calibrated device and how far its predictions are from the runs it was fitted to (relative)."""

    hardware: Hardware
    mean_error: float
    max_error: float
    runs: int

    @property
    def efficiency(self) -> float:
        """Share of the peak that large matrix products reach."""
        return self.hardware.efficiency


def calibrate(measurements: Sequence[Measurement], hardware: Hardware) -> Calibration:
    """Fits the efficiency, and with runs of two shapes or more the bandwidth too.

    Args:
        measurements: measured runs on this hardware.
        hardware: the device as the table has it, one worker's share.

    Raises:
        DataError: no runs, or a step time that is not positive.
    """
    if not measurements:
        raise DataError("no measured runs to calibrate from", place="measurements", mend="train something first")
    for m in measurements:
        if not m.seconds > 0:
            raise DataError(f"a run with {m.seconds} seconds a step", place="measurements", mend="leave it out")
    rows = np.array([_row(m, hardware) for m in measurements])
    seconds = np.array([m.seconds for m in measurements])
    flops, moved = (rows / seconds[:, None]).T
    best = _one(flops, moved, hardware)
    shapes = rows[:, 1] / rows[:, 0]
    if shapes.max() > 1.02 * shapes.min():
        scale = moved.mean()
        (x, y), *_ = np.linalg.lstsq(np.stack([flops, moved / scale], axis=1), np.ones_like(flops), rcond=None)
        y /= scale
        least = 1 / _most(hardware)
        if 0 < x < least:
            # With the efficiency at its bound, the bytes explain the rest.
            x, y = least, (moved * (1 - least * flops)).sum() / (moved**2).sum()
        # A negative part means the runs do not tell the two apart: keep the table's bandwidth.
        if x > 0 and y > 0:
            best = replace(hardware, efficiency=float(1 / x), bandwidth=float(1 / y))
    errors = [abs(predicted(m, best) / m.seconds - 1) for m in measurements]
    return Calibration(best, statistics.fmean(errors), max(errors), len(measurements))


def _row(m: Measurement, hw: Hardware) -> tuple[float, float]:
    """(seconds at efficiency 1, bytes) of one step; communication counts as bytes over the table's links."""
    a, p = parse(m.config), precision(m.precision_name)
    w = work(a, m.layout, p, m.sequence_length, m.global_batch, hw.kind, m.trainable)
    micro_batches = max(m.layout.micro_batches(m.global_batch), 1)
    stretch = 1 + bubble(m.layout, micro_batches)
    linked = sum(communication(a, m.layout, hw, p, m.sequence_length, micro_batches).values())
    return w.flops * stretch / peak_flops(hw, p), w.bytes * stretch + w.optimizer + linked * hw.bandwidth


def _one(flops: Any, moved: Any, hw: Hardware) -> Hardware:
    """Only the efficiency: what the bytes do not explain at the table's bandwidth is arithmetic."""
    rest = np.clip(1 - moved / hw.bandwidth, 0.2, None)
    x = float((flops * rest).sum() / (flops**2).sum())
    return hw.calibrated(min(1 / x, _most(hw)))


def _most(hw: Hardware) -> float:
    """The largest efficiency to believe: a CPU's peak is that of its base clock, which it runs above."""
    return 2.0 if hw.kind == "cpu" else 1.0


def predicted(m: Measurement, hw: Hardware) -> float:
    """Seconds of a step of the measured run on `hw`."""
    return step_time(
        m.config, sequence_length=m.sequence_length, global_batch=m.global_batch, hardware=hw, layout=m.layout,
        precision_name=m.precision_name, trainable=m.trainable,
    ).seconds  # fmt: skip
