"""Layouts to compare with one process, and a process group that trains all of them in turn."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from modelyard.models import ModelOptions
from modelyard.recipe.schema import Options
from modelyard.train.options import TrainOptions
from modelyard.train.programs import PretrainJob

STEPS = 20
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
DEEP = SIZES | {"num_hidden_layers": 4}
"""For pipelines of several chunks a worker. Every layer and micro-batch more is a third of a second more a case."""
EXPERTS = {
    "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SIZES},
    "deep": {"model_type": "llama", **DEEP},
    "tied": {"model_type": "llama", **DEEP, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "t5": {
        "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0,
        "vocab_size": 400,
    },
    "mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"model_type": "qwen3_moe", **SIZES, **EXPERTS},
    "deep_moe": {"model_type": "qwen3_moe", **DEEP, **EXPERTS},
}  # fmt: skip


PROGRAMS = {
    "PretrainJob": "modelyard.train.programs:pretrain",
    "FinetuneJob": "modelyard.train.programs:finetune",
    "PreferenceJob": "modelyard.align.programs:prefer",
}
"""What trains a job, by the job's class, which stands in the same module."""


def job(tokens: Path, folder: Path, model: str, *, checkpoints: bool = False, **train: Any) -> PretrainJob:
    """A job of `STEPS` steps on model `model`, with `checkpoints` where a test goes on from them.

    At a rate of 1e-2, sums taken in another order (1e-7) grow to 3e-5 within 20 steps, whatever the layout.
    """
    options = {"steps": STEPS, "global_batch": 8, "micro_batch": 8, "learning_rate": 3e-3, "checkpoint_every": 10}
    return PretrainJob(
        tokens=str(tokens),
        output=str(folder / "model"),
        train=TrainOptions(**{**options, **train}),
        model=ModelOptions(config=MODELS[model]),
        checkpoints=str(folder / "checkpoints") if checkpoints else None,
    )


def run_all(rank: int, workers: int, port: int, jobs: dict[str, tuple[str, str]], out: str) -> None:
    """Entry of one process: joins the group and trains every job; rank 0 leaves all outcomes in `out`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from modelyard.train.world import joined

    torch.set_num_threads(1)
    outcomes: dict[str, Any] = {}
    with joined(timeout_s=120) as world:
        for name, (kind, text) in jobs.items():
            module, _, program = PROGRAMS[kind].partition(":")
            home = import_module(module)
            said: list[str] = []
            began = time.perf_counter()
            try:
                outcome = getattr(home, program)(getattr(home, kind).model_validate_json(text), world, say=said.append)
            except BaseException:
                print(f"--- {name}, rank {rank}", traceback.format_exc(), file=sys.stderr, flush=True)
                raise
            outcomes[name] = {
                "history": outcome.history,
                "heldout": outcome.heldout_loss,
                "parameters": outcome.parameters,
                "said": said,
                "seconds": time.perf_counter() - began,
            }
    if rank == 0:
        Path(out).write_text(json.dumps(outcomes))


def trained_in_turn(workers: int, jobs: Mapping[str, Options], out: Path) -> dict[str, Any]:
    """Runs all jobs in one group of processes and returns what they came to."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["parallel_cases", "modelyard.train.programs", "transformers.models.llama"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    texts = {name: (type(each).__name__, each.model_dump_json()) for name, each in jobs.items()}
    arguments = (workers, port, texts, str(out))
    processes = [context.Process(target=run_all, args=(rank, *arguments), daemon=True) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
    assert [process.exitcode for process in processes] == [0] * workers
    outcomes: dict[str, Any] = json.loads(out.read_text())
    return outcomes
