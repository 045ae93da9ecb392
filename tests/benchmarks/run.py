"""Runs benchmarks, each in a fresh process: `python tests/benchmarks/run.py [NAME]`.

With a name: that benchmark; its JSON is the last line of stdout. Without: all of them, and their
table goes to docs/benchmarks.md. A missed target is a result and no failure; exit code 1 means that
a benchmark did not end with a valid result line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parents[1] / "docs" / "benchmarks.md"
HELPERS = {"run", "contract", "serve_models", "throughput_sides", "align_sides"}
REQUIRED = ("name", "unit", "ours", "peer", "peer_name", "ratio", "target", "pass")


class Broken(Exception):
    """A benchmark failed or its last line is not a result."""


def names(folder: Path = FOLDER) -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(path.stem for path in folder.glob("*.py") if path.stem not in HELPERS)


def run_one(name: str, folder: Path = FOLDER) -> dict[str, Any]:
    """Runs one benchmark and returns its result; its stderr passes through. Raises Broken."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}
    # One thread a process unless the benchmark says otherwise: CPU seconds then mean work, not spinning.
    environment.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(
        [sys.executable, str(folder / f"{name}.py")], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        raise Broken(f"{name} ended with exit code {done.returncode}")
    try:
        result = json.loads(lines[-1])
    except ValueError as error:
        raise Broken(f"{name}: the last line is not JSON: {lines[-1][:120]}") from error
    absent = [key for key in REQUIRED if key not in result] if isinstance(result, dict) else list(REQUIRED)
    if absent:
        raise Broken(f"{name}: the result lacks {', '.join(absent)}")
    return dict(result)


def table(results: Sequence[Mapping[str, Any]], broken: Sequence[str] = ()) -> str:
    """The Markdown page of all results."""
    head = [
        "# Benchmarks",
        "",
        "Written by `make bench`; each row by `make bench NAME=...`. Figures are medians of at least three",
        "repeats in CPU seconds of the whole process tree where the unit says so; ours and the peer run in",
        "turns on one machine. Trust ratios more than figures.",
        "",
        f"Machine: {machine()}, Python {platform.python_version()}, {time.strftime('%Y-%m-%d')}.",
        "",
        "| benchmark | ours | peer | unit | peer is | ratio | target | met | more |",
        "|---|---:|---:|---|---|---:|---:|---|---|",
    ]
    rows = [_row(result) for result in results]
    rows += [f"| {line.split(':')[0].split()[0]} | | | | | | | failed | {_cell(line)} |" for line in broken]
    return "\n".join([*head, *rows, ""])


def _row(result: Mapping[str, Any]) -> str:
    sign = "<=" if result.get("better") == "less" else ">="
    more = {key: value for key, value in result.items() if key not in {*REQUIRED, "better"}}
    cells = [
        result["name"], _number(result["ours"]), _number(result["peer"]), result["unit"], result["peer_name"],
        _number(result["ratio"]), f"{sign} {_number(result['target'])}", "yes" if result["pass"] else "no",
        "; ".join(f"{key} {_number(value)}" for key, value in more.items()),
    ]  # fmt: skip
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return json.dumps(value) if isinstance(value, list | dict) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def machine() -> str:
    """Processor and number of cores."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        model = found[0] if found else model
    return f"{model}, {os.cpu_count()} cores"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one benchmark or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", help=f"one of: {', '.join(names())}")
    chosen = parser.parse_args(arguments).name
    if chosen is not None and chosen not in names():
        parser.error(f"there is no benchmark {chosen!r}; there are: {', '.join(names())}")
    results, broken = [], []
    for name in [chosen] if chosen else names():
        print(f"== {name}", file=sys.stderr, flush=True)
        try:
            results.append(run_one(name))
        except Broken as error:
            broken.append(str(error))
            print(f"error: {error}", file=sys.stderr, flush=True)
    if chosen is None:
        PAGE.write_text(table(results, broken))
        print(f"wrote {PAGE}", file=sys.stderr)
    for result in results:
        print(json.dumps(result), flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
