"""Tokens a CPU-second of the training loop in one process against a plain PyTorch loop of the same model.

    python tests/benchmarks/train_throughput.py

Both train a 15 M Llama on the same batches with the same AdamW, warm-up, clipping and loss, turn about in one process,
so that whatever else the machine does hits both. Also measured: compiled blocks against not, and the wall-clock
tokens a second of two FSDP2 workers against the plain loop alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from modelyard.models import ModelOptions, build_config, build_on_meta, initialise
from modelyard.models.build import materialise
from modelyard.tokens import Sequences, TokenDataset, TokenWriter, global_batch_indices
from modelyard.train.loop import Job, fit
from modelyard.train.objective import causal_lm
from modelyard.train.optimizer import make_optimizer
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.parallelize import parallelize
from modelyard.train.world import World

MODEL, LENGTH, VOCABULARY, BATCH = "llama-15m", 256, 8192, 8
STEPS, ROUNDS, TARGET = 3, 4, 0.98
ALONE = World(0, 1, torch.device("cpu"))


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def write_tokens(folder: Path) -> Path:
    """Random tokens: speed does not depend on what they say."""
    random = np.random.default_rng(0)
    for name, n in (("train", 512), ("heldout", 8)):
        writer = TokenWriter(folder / name, LENGTH, VOCABULARY)
        rows = random.integers(0, VOCABULARY, (n, LENGTH))
        writer.add(Sequences(rows, np.zeros((n, LENGTH), dtype=bool), np.full(n, LENGTH)))
        writer.close(n, n * LENGTH)
    return folder


def fresh_model() -> Any:
    """The benchmark's model with initial weights."""
    model = build_on_meta(build_config(ModelOptions(preset=MODEL), VOCABULARY))
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    return model


def ours(data: TokenDataset, compiled: bool) -> Callable[[], None]:
    """`STEPS` steps of the loop."""
    options = TrainOptions(steps=STEPS, global_batch=BATCH, micro_batch=BATCH, learning_rate=1e-4, compile=compiled)
    model = parallelize(fresh_model(), options, ALONE)
    optimizer = make_optimizer(model, options)
    return lambda: void(fit(Job(model, optimizer, causal_lm, data, LENGTH, options), ALONE))


def plain(data: TokenDataset) -> Callable[[], None]:
    """`STEPS` steps as anyone would write them."""
    model = fresh_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / 1000)))

    def steps() -> None:
        model.train()
        for step in range(STEPS):
            ids = torch.from_numpy(data.batch(global_batch_indices(0, step, BATCH, len(data)))["input_ids"])
            logits = model(input_ids=ids).logits
            loss = F.cross_entropy(logits[:, :-1].reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            loss.item()

    return steps


def void(_: object) -> None:
    """Drops a value."""


def alternate(runs: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """CPU-seconds of each run, `ROUNDS` times in turn, after a round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            began = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - began)
        say(f"round {turn}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items() if s))
    return seconds


def two_workers(tokens: Path, folder: Path) -> Iterator[float]:
    """Seconds of each step of two FSDP2 processes over gloo, the first two left out."""
    train = {"steps": 10, "global_batch": BATCH, "micro_batch": BATCH, "learning_rate": 1e-4}
    job = {"tokens": str(tokens), "output": str(folder / "model"), "model": {"preset": MODEL}, "train": train}
    (folder / "job.json").write_text(json.dumps({"pretrain": job}))
    shutil.copytree(make_tokenizer(folder), tokens / "tokenizer")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "modelyard.train"]
    done = subprocess.run(
        [*command, str(folder / "job.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines()[2:]:
        yield float(json.loads(line)["seconds"])


def make_tokenizer(folder: Path) -> Path:
    """A minimal tokenizer folder, which the exported model needs."""
    from modelyard.tokens.tokenizer import save_tokenizer, train_tokenizer

    save_tokenizer(train_tokenizer(["some words"], 261), folder / "tokenizer")
    return folder / "tokenizer"


def wall_seconds(run: Callable[[], None]) -> float:
    """Median wall-clock seconds of a step."""
    found = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        found.append((time.perf_counter() - began) / STEPS)
    return statistics.median(found)


def main() -> None:
    """Prints the result as one JSON object."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        tokens = write_tokens(Path(name) / "tokens")
        data = TokenDataset.open(tokens / "train")
        bare = plain(data)
        runs = {"ours": ours(data, False), "plain": bare}
        if shutil.which("g++") or shutil.which("c++"):
            runs["compiled"] = ours(data, True)
        seconds = {name: statistics.median(times) for name, times in alternate(runs).items()}
        alone = wall_seconds(bare)
        (Path(name) / "two").mkdir()
        together = statistics.median(two_workers(tokens, Path(name) / "two"))
    rate = {name: STEPS * BATCH * LENGTH / value for name, value in seconds.items()}
    ratio = rate["ours"] / rate["plain"]
    result = {
        "name": "train_throughput",
        "unit": "tokens/cpu-s",
        "ours": round(rate["ours"], 1),
        "peer": round(rate["plain"], 1),
        "peer_name": "plain PyTorch loop",
        "ratio": round(ratio, 3),
        "target": TARGET,
        "pass": ratio >= TARGET,
        "ratio_bare": round(ratio, 3),
        "ratio_hf_trainer": None,
        "compile_speedup": round(rate["compiled"] / rate["ours"], 3) if "compiled" in rate else None,
        "two_workers_tokens_per_s": round(BATCH * LENGTH / together, 1),
        "one_process_tokens_per_s": round(BATCH * LENGTH / alone, 1),
        "ratio_two_workers": round(alone / together, 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
