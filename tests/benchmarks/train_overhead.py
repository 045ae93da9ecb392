"""The training loop under Ray Train against the same loop without Ray, two gloo workers each: cost of a step.

    python tests/benchmarks/train_overhead.py

An 8 M Llama with FSDP2. The two take turns. `ours` and `peer` are CPU seconds a step of the whole process tree (Ray's
own processes, the driver and its drain included), between the same two steps; `wall_ratio` compares the median wall
times. `first_step_s` is the time from handing the job over until the first step is done, with Ray itself already up.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from contract import tree_cpu_seconds

HERE = Path(__file__).resolve().parent
# Parts of the tests serve here too, and in the processes started below.
sys.path[:0] = [str(HERE), str(HERE.parent / "train"), str(HERE.parent / "stages")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}

MODEL, BATCH, STEPS, REPEATS, TARGET = "llama-8m", 8, 40, 4, 1.03
FIRST = 4
"""CPU time is counted from this step to the last."""


@dataclass
class Turn:
    """One run: CPU and wall seconds a step, and when what had started."""

    cpu: float
    wall: float
    start: dict[str, float] = field(default_factory=dict)


class Counter:
    """CPU seconds of the process tree between step `FIRST` and the last one seen."""

    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def step(self, number: int) -> None:
        """Called when a step is known to be done."""
        if number >= FIRST and number not in self.seen:
            self.seen[number] = tree_cpu_seconds()

    @property
    def each(self) -> float:
        """Seconds a step."""
        first, last = min(self.seen), max(self.seen)
        return (self.seen[last] - self.seen[first]) / (last - first)


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def settled(history: list[dict[str, float]]) -> float:
    """Median seconds of a step, the first three left out."""
    return statistics.median(row["seconds"] for row in history[3:])


def write_tokens(folder: Path) -> Path:
    """A token artifact's folder: 512 sequences of 256 random ids, and a minimal tokenizer, which the model needs."""
    from modelyard.tokens import Sequences, TokenWriter
    from modelyard.tokens.tokenizer import save_tokenizer, train_tokenizer

    rows = np.random.default_rng(0).integers(8, 8192, (512, 256))
    writer = TokenWriter(folder / "train", 256, 8192)
    writer.add(Sequences(rows, np.zeros(rows.shape, dtype=bool), np.full(len(rows), 256)))
    writer.close(len(rows), rows.size)
    save_tokenizer(train_tokenizer(["some words"], 261), folder / "tokenizer")
    facts = {"vocab_size": 8192, "sequence_length": 256, "train_sequences": 512, "unigram_entropy": 9.0}
    (folder / "tokens.json").write_text(json.dumps(facts))
    return folder


def without_ray(tokens: Path, folder: Path) -> Turn:
    """Two processes of our own; rank 0 leaves the number of the last step in a file."""
    from training_parts import trained

    from modelyard.models import ModelOptions
    from modelyard.train.options import TrainOptions
    from modelyard.train.programs import PretrainJob

    job = PretrainJob(
        tokens=str(tokens),
        output=str(folder / "model"),
        model=ModelOptions(preset=MODEL),
        train=TrainOptions(steps=STEPS, global_batch=BATCH, learning_rate=1e-4),
    )
    counter, done, marker = Counter(), threading.Event(), folder / "out.step"

    def watch() -> None:
        while not done.wait(0.05):
            text = marker.read_text() if marker.exists() else ""
            if text.isdigit():
                counter.step(int(text))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    history = trained(job, 2, folder / "out.json")["history"]
    done.set()
    thread.join()
    return Turn(counter.each, settled(history))


def with_ray(tokens: Path, folder: Path) -> Turn:
    """Two Ray Train workers."""
    from training_stage import artifact, run_stage

    from modelyard.stages import live
    from modelyard.stages.pretrain import PretrainOptions

    counter, found = Counter(), dict[str, Any]()
    handle = live.Live.handle

    def seen(self: live.Live, kind: str, value: Any) -> None:
        handle(self, kind, value)
        found["start"] = self.post.start
        if kind == "metrics":
            counter.step(value.step)
        if kind == "outcome":
            found["history"] = value.history

    live.Live.handle = seen  # type: ignore[method-assign]
    options = PretrainOptions.model_validate(
        {
            "kind": "pretrain", "model": {"preset": MODEL}, "steps": STEPS, "global_batch": BATCH,
            "learning_rate": 1e-4, "checkpoint_every": 1000, "resources": {"workers": 2},
        }
    )  # fmt: skip
    try:
        run_stage(options, {"tokens": artifact(tokens, "tokenize")}, folder)
    finally:
        live.Live.handle = handle  # type: ignore[method-assign]
    return Turn(counter.each, settled(found["history"]), found["start"])


def main() -> None:
    """Prints the result as one JSON object."""
    from modelyard.stages import session

    session.start(2)
    ray: list[Turn] = []
    bare: list[Turn] = []
    with tempfile.TemporaryDirectory() as name:
        tokens = write_tokens(Path(name) / "tokens")
        for turn in range(REPEATS):
            ray.append(with_ray(tokens, Path(name) / f"ray{turn}"))
            (Path(name) / f"bare{turn}").mkdir()
            bare.append(without_ray(tokens, Path(name) / f"bare{turn}"))
            start = ", ".join(f"{what} {at:.1f} s" for what, at in ray[-1].start.items())
            sides = f"Ray {ray[-1].cpu:.3f} CPU s and {ray[-1].wall:.3f} s a step, bare {bare[-1].cpu:.3f} and "
            say(f"turn {turn}: {sides}{bare[-1].wall:.3f} ({start})")
    session.stop()
    ratio = statistics.median(r.cpu / b.cpu for r, b in zip(ray, bare, strict=True))
    result = {
        "name": "train_overhead",
        "unit": "cpu-s/step",
        "ours": round(statistics.median(turn.cpu for turn in ray), 4),
        "peer": round(statistics.median(turn.cpu for turn in bare), 4),
        "peer_name": "the same loop without Ray",
        "ratio": round(ratio, 3),
        "target": TARGET,
        "pass": ratio <= TARGET,
        "wall_ratio": round(statistics.median(r.wall / b.wall for r, b in zip(ray, bare, strict=True)), 3),
        "first_step_s": round(statistics.median(turn.start["first_step"] for turn in ray), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
