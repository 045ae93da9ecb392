"""Where the time of a step goes: data, forward, backward, communication, optimizer, and what lies between steps."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

PHASES = ("data", "forward", "backward", "communication", "optimizer", "checkpoint", "evaluation")
_ON_DEVICE = {"forward", "backward", "communication", "optimizer"}


class Clock:
    """Seconds by phase of the step that is running.

    A phase inside another is counted once, for itself. On CUDA, phases that compute are measured by events, which
    never make the host wait: what is not finished yet counts for the next step.
    """

    def __init__(self, device: torch.device) -> None:
        self._events = device.type == "cuda"
        self._open: list[float] = []
        self._seconds: dict[str, float] = defaultdict(float)
        self._pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Counts the body as `phase`."""
        if self._events and phase in _ON_DEVICE:
            yield from self._by_events(phase)
            return
        began = time.perf_counter()
        self._open.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - began
            self._seconds[phase] += spent - self._open.pop()
            if self._open:
                self._open[-1] += spent

    def _by_events(self, phase: str) -> Iterator[None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        yield
        end.record()
        self._pending.append((phase, start, end))

    @property
    def own(self) -> float:
        """Seconds this worker has worked in this step, waiting for others left out. On CUDA only what the host did."""
        return sum(seconds for phase, seconds in self._seconds.items() if phase in ("data", "forward", "backward"))

    def finish(self) -> dict[str, float]:
        """Ends a step: its seconds by phase, `{phase}_seconds`, and starts over."""
        waiting = []
        for phase, start, end in self._pending:
            if end.query():
                self._seconds[phase] += start.elapsed_time(end) / 1000
            else:
                waiting.append((phase, start, end))
        found = {f"{phase}_seconds": self._seconds[phase] for phase in PHASES if phase in self._seconds}
        self._pending, self._seconds = waiting, defaultdict(float)
        return found


class Timings:
    """Adds steps up: means since the last look, and over the whole run but its first step, which warms up."""

    def __init__(self) -> None:
        self._recent: list[dict[str, float]] = []
        self._sums: dict[str, float] = defaultdict(float)
        self._steps = -1

    def add(self, seconds: dict[str, float]) -> None:
        """Takes one step in."""
        self._steps += 1
        if self._steps == 0:
            return
        self._recent.append(seconds)
        for name, value in seconds.items():
            self._sums[name] += value

    def recent(self) -> dict[str, float]:
        """Mean seconds by phase of the steps since the last call."""
        found, self._recent = self._recent, []
        names = dict.fromkeys(name for seconds in found for name in seconds)
        return {name: sum(seconds.get(name, 0.0) for seconds in found) / len(found) for name in names}

    def mean(self) -> dict[str, float]:
        """Mean seconds by phase of all steps."""
        return {name: value / self._steps for name, value in self._sums.items()} if self._steps > 0 else {}


class _Gather(DefaultAllGather):
    """FSDP's all-gather, timed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock("communication"):
            return super().__call__(*args, **kwargs)


class _Scatter(DefaultReduceScatter):
    """FSDP's reduce-scatter, timed."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._clock("communication"):
            return super().__call__(*args, **kwargs)


def time_collectives(model: nn.Module, clock: Clock, device: torch.device) -> None:
    """Makes the collectives of a sharded model count as communication.

    Only where the host waits for them, on a CPU. On CUDA they overlap with compute, and a trace shows them.
    """
    if device.type != "cpu":
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_custom_all_gather(_Gather(clock))
            module.set_custom_reduce_scatter(_Scatter(clock))
