"""Step time of the training loop under Ray Train against the same loop without Ray, two gloo workers each.

    python tests/benchmarks/train_overhead.py

An 8 M Llama with FSDP2. The two take turns; `first_step_s` is the time from handing the job to Ray Train until the
first optimizer step is done, with Ray itself already up.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
# Parts of the tests serve here too, and in the processes started below.
sys.path[:0] = [str(HERE), str(HERE.parent / "train"), str(HERE.parent / "stages")]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}

MODEL, BATCH, STEPS, REPEATS, TARGET = "llama-8m", 8, 14, 3, 1.03


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def settled(history: list[dict[str, float]]) -> float:
    """Median seconds of a step, the first three left out."""
    return statistics.median(row["seconds"] for row in history[3:])


def without_ray(tokens: Path, folder: Path) -> float:
    """Seconds a step of two processes of our own."""
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
    return settled(trained(job, 2, folder / "out.json")["history"])


def with_ray(tokens: Path, folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds a step of two Ray Train workers, and seconds until workers ran, had imported, and had done a step."""
    from training_stage import artifact, run_stage

    from modelyard.stages import live
    from modelyard.stages.pretrain import PretrainOptions

    found: dict[str, Any] = {}
    handle = live.Live.handle

    def seen(self: live.Live, kind: str, value: Any) -> None:
        handle(self, kind, value)
        found["start"] = self.post.start
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
    return settled(found["history"]), found["start"]


def main() -> None:
    """Prints the result as one JSON object."""
    from train_throughput import make_tokenizer, write_tokens

    from modelyard.stages import session

    session.start(2)
    ray, bare, first = [], [], []
    with tempfile.TemporaryDirectory() as name:
        tokens = write_tokens(Path(name) / "tokens")
        make_tokenizer(tokens)
        facts = {"vocab_size": 8192, "sequence_length": 256, "train_sequences": 512, "unigram_entropy": 9.0}
        (tokens / "tokens.json").write_text(json.dumps(facts))
        for turn in range(REPEATS):
            seconds, start = with_ray(tokens, Path(name) / f"ray{turn}")
            ray.append(seconds)
            first.append(start["first_step"])
            (Path(name) / f"bare{turn}").mkdir()
            bare.append(without_ray(tokens, Path(name) / f"bare{turn}"))
            parts = ", ".join(f"{name} {at:.1f} s" for name, at in start.items())
            say(f"turn {turn}: Ray {ray[-1]:.3f} s a step ({parts}), bare {bare[-1]:.3f} s")
    session.stop()
    ratio = statistics.median(r / b for r, b in zip(ray, bare, strict=True))
    result = {
        "name": "train_overhead",
        "unit": "s/step",
        "ours": round(statistics.median(ray), 4),
        "peer": round(statistics.median(bare), 4),
        "peer_name": "the same loop without Ray",
        "ratio": round(ratio, 3),
        "target": TARGET,
        "pass": ratio <= TARGET,
        "first_step_s": round(statistics.median(first), 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
