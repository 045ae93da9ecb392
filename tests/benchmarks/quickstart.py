"""Held-out bits per byte of a model trained on the curated corpus against one trained on the raw one, at equal tokens.

    python tests/benchmarks/quickstart.py

Both corpora come from the quickstart's own recipe: the curated one with its steps, the raw one with normalization
alone. One tokenizer, trained on the raw text, serves both. Documents are held out by a hash of their id, so both
models miss the same ones; both are judged on the curated ones of these. Near-copies of held-out documents stay in the
raw corpus, which favours it. Three seeds; `peer` is the raw corpus.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}

PIPELINE = Path(__file__).resolve().parents[2] / "pipelines" / "quickstart.yaml"
SEEDS, STEPS, BATCH, LENGTH, MODEL = (0, 1, 2), 100, 16, 256, "llama-2m"
BYTES = "12MB"


def say(text: str) -> None:
    """Progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def tokenized(root: Path, name: str, assignments: list[str]) -> Path:
    """The token folder of the quickstart with `assignments`, its artifacts below `root`."""
    from modelyard.stages import api
    from modelyard.stages.graph import select

    sets = [f"root={root}", f"name={name}", f"corpus.inputs.files.max_bytes={BYTES}", "tokens.heldout=0.05"]
    recipe = select(api.load(PIPELINE, [*sets, *assignments]), ["tokens"], ())
    outcome = api.run(recipe)
    corpus = outcome.artifacts["corpus"].manifest.counts
    say(f"{name}: {corpus}")
    return Path(outcome.artifacts["tokens"].local())


def bits_per_byte(loss: float, heldout: Path) -> float:
    """Nats a token as bits a byte of the held-out text."""
    index = json.loads((heldout / "index.json").read_text())
    return loss * index["tokens"] / index["text_bytes"] / math.log(2)


def trained(tokens: str, output: str, seed: int) -> float:
    """Held-out loss, nats a token, after the same number of tokens."""
    import torch

    from modelyard.models import ModelOptions
    from modelyard.train.options import TrainOptions
    from modelyard.train.programs import PretrainJob, pretrain
    from modelyard.train.world import World

    torch.set_num_threads(1)
    job = PretrainJob(
        tokens=tokens,
        output=output,
        model=ModelOptions(preset=MODEL),
        train=TrainOptions(steps=STEPS, global_batch=BATCH, learning_rate=6e-3, seed=seed),
    )
    outcome = pretrain(job, World(0, 1, torch.device("cpu")))
    assert outcome.heldout_loss is not None
    return outcome.heldout_loss


def side(folder: Path, train: Path, heldout: Path) -> Path:
    """A token folder of one corpus to train on and another to be judged on."""
    folder.mkdir()
    for name, source in (("train", train), ("heldout", heldout), ("tokenizer", train)):
        (folder / name).symlink_to(source / name)
    return folder


def main() -> None:
    """Prints the result as one JSON object."""
    from modelyard.stages import session

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        raw = tokenized(root / "raw", "raw", ["corpus.steps=[{normalize: {}}]"])
        path = f"tokens.tokenizer={{path: {raw / 'tokenizer'}}}"
        curated = tokenized(root / "curated", "curated", [path])
        session.stop()
        sides = {"curated": side(root / "a", curated, curated), "raw": side(root / "b", raw, curated)}
        found: dict[str, list[float]] = {corpus: [] for corpus in sides}
        with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
            waiting = [
                (corpus, seed, pool.submit(trained, str(folder), str(root / f"{corpus}-{seed}"), seed))
                for seed in SEEDS
                for corpus, folder in sides.items()
            ]
            for corpus, seed, future in waiting:
                found[corpus].append(bits_per_byte(future.result(), curated / "heldout"))
                say(f"{corpus}, seed {seed}: {found[corpus][-1]:.4f} bits a byte")
    ours, peer = (statistics.fmean(found[corpus]) for corpus in ("curated", "raw"))
    result = {
        "name": "quickstart",
        "unit": "bits/byte",
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "peer_name": "the same on the raw corpus",
        "ratio": round(ours / peer, 4),
        "target": 1.0,
        "pass": all(a < b for a, b in zip(found["curated"], found["raw"], strict=True)),
        "curated": [round(value, 4) for value in found["curated"]],
        "raw": [round(value, 4) for value in found["raw"]],
        "tokens": STEPS * BATCH * LENGTH,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
