"""Profiles of chosen steps: a trace for Perfetto or chrome://tracing, the operators that cost most, and memory."""

from __future__ import annotations

import csv
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from modelyard import storage
from modelyard.train.hooks import Hooks
from modelyard.train.metrics import Say
from modelyard.train.run_options import ProfileOptions
from modelyard.train.world import World

_RANKS = 8
"""Workers that write a trace; more would say the same again."""
_OPERATORS = 40
_COLLECTIVES = ("nccl", "gloo:")


class Profiler(Hooks):
    """Profiles the steps of `options` on the first workers and writes `profile/*-rank-N.*` below `reports`.

    `trace` (JSON, gzipped), `operators` (text, by own time) and, with `memory`, the allocator's curve as CSV on a CPU
    or a snapshot for pytorch.org/memory_viz on CUDA.
    """

    def __init__(self, options: ProfileOptions, world: World, reports: str, say: Say) -> None:
        self._options, self._world, self._reports, self._say = options, world, reports, say
        self._running: Any = None
        self._steps: list[int] = []
        """First and last step of this start, counted from 1; empty before the first."""
        self._written = False

    def begin(self, step: int, steps: int) -> None:
        self._steps = [*self._steps[:1], step + 1]
        if step + 1 != self._options.first or self._world.rank >= _RANKS:
            return
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            if self._options.memory:
                torch.cuda.memory._record_memory_history()
        self._running = torch.profiler.profile(activities=activities, profile_memory=self._options.memory)
        self._running.__enter__()

    def end(self, step: int) -> None:
        if self._running is not None and step + 1 >= self._options.last:
            self._finish()

    def close(self) -> None:
        if self._running is not None:
            self._finish()
        elif not self._written and self._world.leads and self._steps:
            wanted, trained = (self._options.first, self._options.last), (self._steps[0], self._steps[-1])
            self._say(
                f"no profile: steps {wanted[0]} to {wanted[1]} are not among those trained here, "
                f"{trained[0]} to {trained[1]}"
            )

    def _finish(self) -> None:
        running, self._running = self._running, None
        self._written, steps = True, self._steps[-1] + 1 - self._options.first
        running.__exit__(None, None, None)
        with tempfile.TemporaryDirectory(prefix="modelyard-profile-") as name:
            folder = Path(name)
            trace = folder / "trace.json"
            running.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
            (folder / "trace.json.gz").write_bytes(gzip.compress(trace.read_bytes(), 5))
            trace.unlink()
            averages = running.key_averages()
            sort = "self_device_time_total" if self._world.device.type == "cuda" else "self_cpu_time_total"
            (folder / "operators.txt").write_text(averages.table(sort_by=sort, row_limit=_OPERATORS), encoding="utf-8")
            self._memory(folder, events)
            self._publish(folder)
        if self._world.leads:
            spent = collective_seconds(events) / max(steps, 1)
            self._say(f"profiled {steps} steps ({spent:.3f} s of collectives a step): {self._reports}/profile")

    def _memory(self, folder: Path, events: list[dict[str, Any]]) -> None:
        if not self._options.memory:
            return
        if self._world.device.type == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / "memory.pickle"))  # type: ignore[no-untyped-call]
            torch.cuda.memory._record_memory_history(enabled=None)
            return
        with (folder / "memory.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle)
            writer.writerow(("microseconds", "bytes"))
            writer.writerows(memory_curve(events))

    def _publish(self, folder: Path) -> None:
        for path in sorted(folder.iterdir()):
            stem, _, ending = path.name.partition(".")
            target = storage.join(self._reports, "profile", f"{stem}-rank-{self._world.rank}.{ending}")
            storage.write_bytes(target, path.read_bytes())


def memory_curve(events: list[dict[str, Any]]) -> list[tuple[float, int]]:
    """(microseconds since the first, bytes allocated in all) from a trace's memory events."""
    found = sorted(
        (float(event["ts"]), int(event["args"]["Total Allocated"]))
        for event in events
        if event.get("name") == "[memory]" and "Total Allocated" in event.get("args", {})
    )
    return [(round(at - found[0][0], 1), size) for at, size in found]


def collective_seconds(events: list[dict[str, Any]]) -> float:
    """Seconds of all collectives of a trace, hidden behind compute or not."""
    return sum(float(e.get("dur", 0)) for e in events if str(e.get("name", "")).startswith(_COLLECTIVES)) / 1e6
