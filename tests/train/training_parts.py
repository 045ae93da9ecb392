"""Parts for training tests: token folders, jobs, and processes that can be killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

from modelyard.models import ModelOptions
from modelyard.tokens import Sequences, TokenWriter
from modelyard.tokens.tokenizer import save_tokenizer
from modelyard.train.options import TrainOptions
from modelyard.train.programs import PretrainJob

VOCABULARY, LENGTH = 300, 32
TINY = ModelOptions(
    config={
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
)


def write_tokens(folder: Path, train: int = 400, heldout: int = 40) -> Path:
    """Sequences where the next token mostly follows from the last, cut into documents of random length."""
    random = np.random.default_rng(0)
    for name, n in (("train", train), ("heldout", heldout)):
        rows = np.zeros((n, LENGTH), dtype=np.int64)
        rows[:, 0] = random.integers(8, VOCABULARY, n)
        for i in range(1, LENGTH):
            jump = random.integers(8, VOCABULARY, n)
            rows[:, i] = np.where(random.random(n) < 0.8, (rows[:, i - 1] * 7 + 3) % 290 + 8, jump)
        starts = random.random((n, LENGTH)) < 0.1
        lengths = np.where(np.arange(n) == n - 1, LENGTH - 5, LENGTH)
        writer = TokenWriter(folder / name, LENGTH, VOCABULARY)
        writer.add(Sequences(rows, starts, lengths))
        writer.close(int(starts.sum()) + 1, n * LENGTH)
    save_tokenizer(tokenizer(), folder / "tokenizer")
    facts = {"vocab_size": VOCABULARY, "sequence_length": LENGTH, "train_sequences": train, "unigram_entropy": 5.6}
    (folder / "tokens.json").write_text(json.dumps(facts))
    return folder


def tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges whose ids stay under `VOCABULARY`."""
    specials = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
    words = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    made.add_special_tokens(specials)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    from tokenizers import decoders

    made.decoder = decoders.ByteLevel()
    return made


def pretraining(tokens: Path, folder: Path, **train: Any) -> PretrainJob:
    """A small job whose checkpoints and model lie in `folder`."""
    options = {"steps": 12, "global_batch": 8, "micro_batch": 4, "learning_rate": 1e-2, "checkpoint_every": 4, **train}
    # Tests that kill a process want to know which checkpoint is there.
    options.setdefault("async_checkpoints", False)
    return PretrainJob(
        tokens=str(tokens),
        output=str(folder / "model"),
        train=TrainOptions(**options),
        model=TINY,
        checkpoints=str(folder / "checkpoints"),
    )


def run_process(rank: int, world: int, port: int, program: str, job: str, out: str, pause: float) -> None:
    """Entry of one training process: joins the group, trains, leaves outcome and messages in `out`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from modelyard.train import programs
    from modelyard.train.world import joined

    torch.set_num_threads(1)
    kind = {"pretrain": programs.PretrainJob, "finetune": programs.FinetuneJob}[program]
    said: list[str] = []

    def sink(metrics: Any) -> None:
        # Renamed into place: a reader beside it never sees the file between emptied and written.
        fresh = Path(out).with_suffix(f".step-{rank}")
        fresh.write_text(str(metrics.step))
        fresh.replace(Path(out).with_suffix(".step"))
        time.sleep(pause)

    with joined(timeout_s=60) as group:
        outcome = getattr(programs, program)(kind.model_validate_json(job), group, sink, said.append)
    if rank == 0:
        Path(out).write_text(json.dumps({"history": outcome.history, "heldout": outcome.heldout_loss, "said": said}))


def launch(job: Any, workers: int, out: Path, program: str = "pretrain", pause: float = 0.0) -> list[BaseProcess]:
    """Starts a job on `workers` local processes, forked from a server that has torch loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_parts", "modelyard.train.programs", "transformers.models.llama"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = job.model_dump_json()
    started = [
        context.Process(target=run_process, args=(rank, workers, port, program, text, str(out), pause), daemon=True)
        for rank in range(workers)
    ]
    for process in started:
        process.start()
    return started


def trained(job: Any, workers: int, out: Path, program: str = "pretrain") -> dict[str, Any]:
    """Runs a job to its end and returns what rank 0 left."""
    processes = launch(job, workers, out, program)
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * workers
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def kill_at(processes: list[BaseProcess], victim: int, out: Path, step: int) -> None:
    """Kills one process once `step` steps are done, and then those it leaves behind."""
    marker = out.with_suffix(".step")
    wait_until(lambda: marker.exists() and int(marker.read_text()) >= step, 120)
    os.kill(processes[victim].pid or 0, signal.SIGKILL)
    for process in processes:
        # The others wait for the dead one; nothing more can come of them.
        process.join(0.5)
        if process.is_alive():
            process.kill()
            process.join()
    marker.unlink()


def wait_until(done: Callable[[], bool], seconds: float = 60) -> None:
    """Waits for a condition. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.01)
