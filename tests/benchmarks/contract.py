"""What every benchmark shares: CPU seconds and memory of a process tree, medians, peers, and the result line.

A benchmark is a script. It prints progress to stderr and ends with `report(...)`, whose JSON is the
last line of stdout. Ours and the peer run in turns on the same machine; both are measured in CPU
seconds of the whole process tree, which other processes on the machine disturb little.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

CHECKOUT = Path(__file__).resolve().parents[2]
REQUIRED = ("name", "unit", "ours", "peer", "peer_name", "ratio", "target", "pass")
TEXT_SUFFIXES = (".md", ".rst", ".txt", ".py")


def say(text: str) -> None:
    """One line of progress, to stderr."""
    print(text, file=sys.stderr, flush=True)


def tree(root: psutil.Process | None = None) -> list[psutil.Process]:
    """A process and all its living descendants; this process when none is given."""
    root = root or psutil.Process()
    return [root, *root.children(recursive=True)]


def tree_cpu_seconds() -> float:
    """CPU seconds (user and system) of this process and its descendants, the ended ones included.

    A process that ended is counted by its parent once the parent has waited for it, so living
    processes with their `children_*` times cover the whole tree.
    """
    total = 0.0
    for process in tree():
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


@dataclass
class Spent:
    """What a block took: CPU seconds of the process tree, and wall seconds."""

    cpu: float = math.nan
    wall: float = math.nan


@contextmanager
def clock() -> Iterator[Spent]:
    """Measures a block: `with clock() as spent: work()`."""
    spent = Spent()
    cpu, wall = tree_cpu_seconds(), time.perf_counter()
    yield spent
    spent.cpu, spent.wall = tree_cpu_seconds() - cpu, time.perf_counter() - wall


@dataclass
class Peak:
    """Highest memory of the process tree seen so far, in MiB."""

    mib: float = 0.0


def unique_mib(processes: Iterable[psutil.Process] | None = None) -> float:
    """Unique memory (USS) of processes in MiB, this process tree's by default.

    USS counts a page once and only where it is not shared, so forked workers are not counted twice.
    """
    total = 0
    for process in tree() if processes is None else processes:
        try:
            total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


@contextmanager
def peak_memory(interval: float = 0.05, measure: Callable[[], float] = unique_mib) -> Iterator[Peak]:
    """The highest that `measure` (MiB) gives, every `interval` seconds while the block runs and at its end."""
    peak, done = Peak(), threading.Event()

    def sample() -> None:
        while not done.wait(interval):
            peak.mib = max(peak.mib, measure())

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak.mib = max(peak.mib, measure())


@dataclass
class Runs:
    """Repeats of one side of a comparison."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    last: Any = None
    """What the last repeat returned."""

    @property
    def cpu_median(self) -> float:
        """Median CPU seconds of a repeat."""
        return statistics.median(self.cpu)

    @property
    def wall_median(self) -> float:
        """Median wall seconds of a repeat."""
        return statistics.median(self.wall)


def in_turns(sides: Mapping[str, Callable[[], Any]], repeats: int = 3, warmup: int = 1) -> dict[str, Runs]:
    """Runs the sides one after the other, `repeats` times over, so that a busy minute hits all of them.

    The first `warmup` rounds (compilation, caches) are not counted.
    """
    runs = {name: Runs() for name in sides}
    for turn in range(warmup + repeats):
        for name, work in sides.items():
            with clock() as spent:
                runs[name].last = work()
            counted = turn >= warmup
            say(f"  {name}: {spent.cpu:.2f} CPU s, {spent.wall:.2f} s{'' if counted else ' (warm-up)'}")
            if counted:
                runs[name].cpu.append(spent.cpu)
                runs[name].wall.append(spent.wall)
    return runs


def peer_python() -> Path:
    """The interpreter of the peers' environment. Exits with the mend when it was not built."""
    path = CHECKOUT / ".venv-bench" / "bin" / "python"
    if not path.exists():
        sys.exit("the peers' environment is absent: run `make bench-env` first")
    return path


def run_peer(program: str | Path, *arguments: str, env: Mapping[str, str] | None = None) -> Any:
    """Runs a peer's script (a path, or source text) in its environment and returns the JSON of its last line.

    Its CPU time belongs to this process tree. Its stderr goes to ours.
    """
    words = [str(program)] if isinstance(program, Path) else ["-c", program]
    done = subprocess.run(
        [str(peer_python()), *words, *arguments],
        env=os.environ | dict(env or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def text_files(max_bytes: int, suffixes: Sequence[str] = TEXT_SUFFIXES) -> list[Path]:
    """Text files up to `max_bytes` in all, in a fixed order.

    From the folder in MODELYARD_BENCH_DATA, else from the installed Python packages, which every
    machine has.
    """
    folder = Path(os.environ.get("MODELYARD_BENCH_DATA") or sysconfig.get_paths()["purelib"])
    chosen, total = [], 0
    for path in sorted(p for p in folder.rglob("*") if p.suffix in suffixes and p.is_file()):
        size = path.stat().st_size
        if total + size <= max_bytes:
            chosen.append(path)
            total += size
    return chosen


def report(
    name: str,
    *,
    unit: str,
    ours: float,
    peer: float,
    peer_name: str,
    target: float,
    better: Literal["more", "less"] = "more",
    **fields: Any,
) -> None:
    """Prints the result line.

    Args:
        name: the benchmark's name, as its file's.
        unit: unit of `ours` and `peer`, such as `MB/CPU s`.
        ours: our figure.
        peer: the peer's figure; `ratio` is ours / peer.
        peer_name: the peer with its version.
        target: the ratio we want: at least it where `better` is "more", at most it where "less".
        better: whether a larger ratio is better.
        fields: further figures of this benchmark.
    """
    ratio = ours / peer if peer else math.inf
    passed = ratio >= target if better == "more" else ratio <= target
    line = {
        "name": name, "unit": unit, "ours": ours, "peer": peer, "peer_name": peer_name, "ratio": ratio,
        "target": target, "better": better, "pass": passed, **fields,
    }  # fmt: skip
    print(json.dumps({key: _rounded(value) for key, value in line.items()}), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value
