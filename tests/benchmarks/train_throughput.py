"""Tokens a CPU-second of the training loop in one process against a bare PyTorch loop and three trainers.

    python tests/benchmarks/train_throughput.py

All train the same 15 M Llama (tied embeddings, sequences of 256, batch of 8, AdamW, clipping, a falling rate) on the
same tokens in fp32, one thread each, in processes of their own that take turns: whatever else the machine does hits
all. `compiled` is our loop with `compile: true`. Memory is the most a process held above what it held before its first
step. LitGPT and torchtitan run in `.venv-bench`; the shims they need are in `throughput_sides.py`. A side that cannot
start is left out and named in `missing`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contract import CHECKOUT, report, say

from modelyard.models.presets import PRESETS
from modelyard.tokens import Sequences, TokenWriter

MODEL, LENGTH, VOCABULARY, BATCH = "llama-15m", 256, 8192, 8
STEPS, ROUNDS, TARGET, COMPILED_TARGET = 1, 25, 0.98, 1.15
HERE = Path(__file__).resolve().parent
PEERS = CHECKOUT / ".venv-bench" / "bin" / "python"
SIDES = {"ours": sys.executable, "compiled": sys.executable, "bare": sys.executable, "hf_trainer": sys.executable,
         "litgpt": str(PEERS), "torchtitan": str(PEERS)}  # fmt: skip


def prepare(folder: Path) -> None:
    """Random tokens (speed does not depend on what they say) for both kinds of reader, and the plan."""
    rows = np.random.default_rng(0).integers(0, VOCABULARY, (512, LENGTH))
    writer = TokenWriter(folder / "train", LENGTH, VOCABULARY)
    writer.add(Sequences(rows, np.zeros(rows.shape, dtype=bool), np.full(len(rows), LENGTH)))
    writer.close(len(rows), rows.size)
    np.save(folder / "rows.npy", rows)
    plan = {"model": PRESETS[MODEL].config() | {"vocab_size": VOCABULARY}, "length": LENGTH, "batch": BATCH}
    (folder / "plan.json").write_text(json.dumps(plan))


class Side:
    """One trainer's process: SCRIPT NAME FOLDER STEPS, which answers each line with a line of JSON."""

    def __init__(
        self, name: str, python: str, folder: Path, script: str = "throughput_sides.py", steps: int = STEPS
    ) -> None:
        self.name = name
        self.cpu: list[float] = []
        self.peak_mib = 0.0
        self.last: dict[str, Any] = {}
        self._log = (folder / f"{name}.log").open("w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            [python, str(HERE / script), name, str(folder), str(steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip

    def turn(self) -> bool:
        """One turn; False when the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("go\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return False
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                self.last = answer
                self.cpu.append(answer["cpu"])
                self.peak_mib = answer["peak_mib"]
                return True
        return False

    def close(self) -> str:
        """Ends the process; the last line it left on stderr."""
        self._process.kill()
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else ""


def take_turns(
    folder: Path, pythons: dict[str, str], script: str = "throughput_sides.py", steps: int = STEPS, rounds: int = ROUNDS
) -> tuple[list[Side], dict[str, str]]:
    """All sides that run, after `rounds` counted turns of `steps`, and why the others do not."""
    sides = [Side(name, python, folder, script, steps) for name, python in pythons.items() if Path(python).exists()]
    missing = {name: "no .venv-bench: run `make bench-env`" for name, p in pythons.items() if not Path(p).exists()}
    for turn in range(rounds + 1):
        for side in list(sides):
            if not side.turn():
                sides.remove(side)
                missing[side.name] = side.close()
                say(f"  {side.name} does not run: {missing[side.name]}")
            elif turn:
                say(f"  {side.name}: {side.cpu[-1]:.2f} CPU s")
    for side in sides:
        side.close()
    return sides, missing


def by_turn(ours: list[float], theirs: list[float]) -> float:
    """How much faster ours is, the median over turns: what slows the machine for a minute hits both of a turn."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def main() -> None:
    """Prints the result as one JSON object."""
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        sides, missing = take_turns(Path(name), SIDES)
    rate = {side.name: STEPS * BATCH * LENGTH / statistics.median(side.cpu[1:]) for side in sides}
    peak = {side.name: side.peak_mib for side in sides}
    others = [name for name in rate if name not in ("ours", "compiled")]
    cpu = {side.name: side.cpu[1:] for side in sides}
    ratios = {f"ratio_{name}": by_turn(cpu["ours"], cpu[name]) for name in others}
    compiled = {f"compiled_ratio_{name}": by_turn(cpu["compiled"], cpu[name]) for name in others if "compiled" in cpu}
    report(
        "train_throughput",
        unit="tokens/CPU s",
        ours=rate["ours"],
        peer=rate["bare"],
        peer_name="bare PyTorch loop",
        target=TARGET,
        **ratios,
        **compiled,
        compile_speedup=by_turn(cpu["compiled"], cpu["ours"]) if "compiled" in cpu else None,
        compiled_pass=all(value >= COMPILED_TARGET for value in compiled.values()) if compiled else None,
        tokens_per_cpu_s=rate,
        peak_mib=peak,
        lowest_memory=min(peak.values()) in (peak["ours"], peak.get("compiled")),
        missing=missing,
    )


if __name__ == "__main__":
    main()
