"""Exact resume: workers and their driver are killed at random steps, and the run goes on with 2, 1 and 2 workers.

    python tests/benchmarks/train_resume.py

A driver process starts FSDP2 workers over gloo, as a launcher would. Three runs of one job: undisturbed on two
workers; killed four times and always resumed on two; killed four times and resumed on 2 -> 1 -> 2 -> 1 -> 2. Kills fall
at random steps and hit a worker or the driver with all of its workers (SIGKILL, nobody can clean up). Checkpoints are
written beside training, so a kill may also hit one that is half written. Compared: the loss of every step.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing import Process
from pathlib import Path
from typing import Any

from contract import CHECKOUT, report, say

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(CHECKOUT / "tests" / "train"))

STEPS, CHECKPOINT_EVERY, TARGET, SEED = 40, 4, 1e-6, 7
KILLS = ("worker", "driver", "worker", "driver")


def drive(job: str, workers: int, out: str) -> None:
    """The driver: starts workers and waits for them."""
    from training_parts import launch

    from modelyard.train.programs import PretrainJob

    processes = launch(PretrainJob.model_validate_json(job), workers, Path(out), pause=0.05)
    Path(out).with_suffix(".pids").write_text(json.dumps([process.pid for process in processes]))
    for process in processes:
        process.join()


def run_once(job: Any, workers: int, out: Path, kill: tuple[str, int] | None) -> None:
    """Runs the job until it ends or until `kill` = (who, step) happens."""
    for suffix in (".pids", ".step"):
        out.with_suffix(suffix).unlink(missing_ok=True)
    driver = Process(target=drive, args=(job.model_dump_json(), workers, str(out)))
    driver.start()
    if kill is not None:
        who, step = kill
        while not (out.with_suffix(".step").exists() and int(out.with_suffix(".step").read_text() or 0) >= step):
            time.sleep(0.02)
        pids = json.loads(out.with_suffix(".pids").read_text())
        # What a dead driver or worker leaves behind ends too, as a cluster would see to it.
        victims = [driver.pid, *pids] if who == "driver" else [pids[-1], *pids[:-1], driver.pid]
        for pid in victims:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
    driver.join()


def losses(tokens: Path, folder: Path, workers: list[int], kills: list[int]) -> list[float]:
    """Losses by step of a run that is killed at `kills` and resumed on the numbers of `workers`."""
    from training_parts import pretraining

    folder.mkdir()
    job = pretraining(tokens, folder, steps=STEPS, checkpoint_every=CHECKPOINT_EVERY, async_checkpoints=True)
    out = folder / "out.json"
    for turn, count in enumerate(workers):
        kill = (KILLS[turn], kills[turn]) if turn < len(kills) else None
        run_once(job, count, out, kill)
        say(f"  {folder.name}: {count} workers, {f'{kill[0]} killed at step {kill[1]}' if kill else 'to the end'}")
    rows = json.loads(out.read_text())["history"]
    if [row["step"] for row in rows] != list(range(1, STEPS + 1)):
        sys.exit(f"steps were left out or trained twice: {[row['step'] for row in rows]}")
    return [row["loss"] for row in rows]


def main() -> None:
    """Prints the result as one JSON object."""
    from training_parts import write_tokens

    chance = random.Random(SEED)
    kills = sorted(chance.sample(range(6, STEPS - 2), len(KILLS)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokens = write_tokens(folder / "tokens")
        whole = losses(tokens, folder / "whole", [2], [])
        same = losses(tokens, folder / "same", [2] * (len(kills) + 1), kills)
        moved = losses(tokens, folder / "moved", [2, 1, 2, 1, 2], kills)
    difference = max(abs(a - b) for a, b in zip(whole, moved, strict=True))
    report(
        "train_resume",
        unit="largest difference of a step's loss, nats",
        ours=difference,
        peer=TARGET,
        peer_name="the bound (uninterrupted run, within 1e-6)",
        target=1.0,
        better="less",
        max_difference=difference,
        kills=2 * len(kills),
        killed_at=kills,
        identical_at_same_size=same == whole,
        steps=STEPS,
    )


if __name__ == "__main__":
    main()
