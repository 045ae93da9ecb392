"""Reinforcement learning on two cores: an engine beside one trainer against two trainers that are engines in turns.

    python tests/benchmarks/align_async.py

The model, prompts and answers of `align_grpo` (15 M, 4 prompts of 64 tokens, 8 answers each, geometric lengths, one
thread a process), as stages on Ray: two workers that train and answer in turns; one worker with one engine apart, in
step with each other (staleness 0) and with staleness 1. The figure is the median of a stage's seconds a step without
its first; the stages take turns, each with another seed. Wall seconds: on a busy machine look at the ratio.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from align_grpo import ANSWER, BATCH, GROUP, prepare
from contract import report, say

from modelyard.stages import api

STEPS, ROUNDS, TARGET = 6, 3, 1.0
PHASES = ("sync", "generate", "reward", "score", "train")


def stage(folder: Path, seed: int, workers: int, engines: int, staleness: int) -> dict[str, Any]:
    """One side as a stage of a recipe."""
    rollouts = {
        "group": GROUP, "max_tokens": ANSWER, "rows": 512, "rewards": [{"kind": "regex", "pattern": r"w\d*77"}],
        "engines": {"count": engines}, "staleness": staleness,
    }  # fmt: skip
    return {
        "kind": "align", "method": "grpo",
        "inputs": {"model": [f"{folder}/model/*"], "data": [f"{folder}/prompts.jsonl"]},
        "rollouts": rollouts, "engine": {"max_sequences": BATCH * GROUP, "threads": 1}, "adapter": {"lora": None},
        "examples": {"template": "plain"}, "heldout": 0.0, "steps": STEPS, "global_batch": BATCH, "micro_batch": 8,
        "sequence_length": 96, "learning_rate": 1e-9, "seed": seed, "checkpoint_every": STEPS,
        "resources": {"workers": workers},
    }  # fmt: skip


SIDES = {
    "colocated": {"workers": 2, "engines": 0, "staleness": 0},
    "apart": {"workers": 1, "engines": 1, "staleness": 0},
    "apart_stale": {"workers": 1, "engines": 1, "staleness": 1},
}


def shares(text: str) -> dict[str, float]:
    """Where the time of a stage went, from its report."""
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines()]
    return {row[0]: float(row[2].rstrip("%")) / 100 for row in rows if len(row) == 3 and row[0] in PHASES}


def main() -> None:
    """Prints the result as one JSON object."""
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    spent: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        prompts = json.loads((folder / "plan.json").read_text())["prompts"]
        rows = [json.dumps({"prompt": " ".join(f"w{i}" for i in prompt)}) for prompt in prompts]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
        for turn in range(ROUNDS):
            for side, how in SIDES.items():
                recipe = {"name": "align-async", "root": f"{folder}/root", "stages": {side: stage(folder, turn, **how)}}
                (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
                found = api.run(api.load(folder / "recipe.yaml")).artifacts[side]
                seconds[side].append(found.manifest.metrics["step_seconds"])
                spent[side] = shares(found.local("report.md").read_text())
                say(f"  {side}: {seconds[side][-1]:.2f} s a step {spent[side]}")
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    report(
        "align_async",
        unit="s/step",
        ours=medians["apart_stale"],
        peer=medians["colocated"],
        peer_name="the same, two workers in turns",
        target=TARGET,
        better="less",
        seconds=seconds,
        shares=spent,
    )


if __name__ == "__main__":
    main()
