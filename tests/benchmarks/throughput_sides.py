"""The sides of `train_throughput`: one trainer in a process of its own, which trains a few steps whenever it is told.

    python tests/benchmarks/throughput_sides.py SIDE FOLDER STEPS

Each line on stdin is a turn of STEPS steps; the answer is a line of JSON with its CPU seconds and the most memory held
so far above what the process held before it trained. Run by `train_throughput.py`; peers run in `.venv-bench`.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

FOREVER = 1_000_000


class Turns:
    """Lets the trainer's own loop run, and stops it after every turn until the next line comes."""

    def __init__(self, steps: int) -> None:
        self._steps, self._done, self._began, self._base = steps, 0, 0.0, 0.0
        self.more: dict[str, float] = {}
        """Further figures for the answer."""

    def start(self) -> None:
        """Before the first step: waits for the first turn."""
        self._base = _resident_mib()
        self._wait()

    def step(self) -> None:
        """After every step."""
        self._done += 1
        if self._done % self._steps == 0:
            spent, peak = time.process_time() - self._began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            print(json.dumps({"cpu": spent, "peak_mib": peak - self._base, **self.more}), flush=True)
            self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self._began = time.process_time()


def _resident_mib() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return math.nan


def batches(folder: Path, plan: dict[str, int]) -> Iterator[torch.Tensor]:
    """Endless batches of token ids [B, L]."""
    rows = np.load(folder / "rows.npy")
    random = np.random.default_rng(0)
    while True:
        yield torch.from_numpy(rows[random.integers(0, len(rows), plan["batch"])])


def ours(folder: Path, plan: dict[str, Any], turns: Turns, compiled: bool = False) -> None:
    """Our loop with our model, objective and optimizer."""
    from modelyard.models import ModelOptions, build_config, build_on_meta, initialise
    from modelyard.models.build import materialise
    from modelyard.tokens import TokenDataset
    from modelyard.train.loop import Job, fit
    from modelyard.train.objective import causal_lm
    from modelyard.train.optimizer import make_optimizer
    from modelyard.train.options import TrainOptions
    from modelyard.train.parallel.parallelize import parallelize
    from modelyard.train.world import World

    world = World(0, 1, torch.device("cpu"))
    config = build_config(ModelOptions(config=plan["model"]), plan["model"]["vocab_size"])
    built = build_on_meta(config)
    materialise(built, world.device)
    initialise(built, 0)
    data, batch = TokenDataset.open(folder / "train"), plan["batch"]
    options = TrainOptions(steps=FOREVER, global_batch=batch, micro_batch=batch, learning_rate=1e-4, compile=compiled)
    model = parallelize(built, options, world).model
    optimizer = make_optimizer(model, options)
    turns.start()
    job = Job(model, optimizer, causal_lm, data, plan["length"], options, sink=lambda metrics: turns.step())
    fit(job, world)


def bare(folder: Path, plan: dict[str, Any], turns: Turns) -> None:
    """A loop as anyone would write it around a transformers model."""
    model = _transformers_model(plan)
    optimizer, schedule = _adamw(model)
    turns.start()
    model.train()
    for ids in batches(folder, plan):
        logits = model(input_ids=ids, use_cache=False).logits
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        turns.step()


def hf_trainer(folder: Path, plan: dict[str, Any], turns: Turns) -> None:
    """`transformers.Trainer` with its fused AdamW."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stops(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step()

    rows = np.load(folder / "rows.npy")
    data = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows)]
    arguments = TrainingArguments(
        output_dir=str(folder / "hf"), per_device_train_batch_size=plan["batch"], max_steps=FOREVER, use_cpu=True,
        learning_rate=1e-4, weight_decay=0.1, max_grad_norm=1.0, lr_scheduler_type="cosine", optim="adamw_torch_fused",
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, bf16=False,
    )  # fmt: skip
    Trainer(model=_transformers_model(plan), args=arguments, train_dataset=data, callbacks=[Stops()]).train()  # type: ignore[arg-type]


def litgpt(folder: Path, plan: dict[str, Any], turns: Turns) -> None:
    """LitGPT's model and loss under Lightning Fabric, in the order of its pre-training loop.

    Shim: AdamW fused on the CPU too (LitGPT asks for it on CUDA only), which favours it.
    """
    from lightning import Fabric
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = plan["model"]
    fabric = Fabric(accelerator="cpu", devices=1, precision="32-true")
    config = Config(
        name="bench", block_size=plan["length"], vocab_size=shape["vocab_size"], padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"], n_head=shape["num_attention_heads"], n_embd=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"], rotary_percentage=1.0, parallel_residual=False, bias=False,
        norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP",
    )  # fmt: skip
    plain = GPT(config)
    plain.transformer.wte.weight = plain.lm_head.weight
    model = fabric.setup(plain)
    optimizer, schedule = _adamw(model)
    optimizer = fabric.setup_optimizers(optimizer)
    turns.start()
    model.train()
    for ids in batches(folder, plan):
        logits = model(ids[:, :-1].contiguous())
        fabric.backward(chunked_cross_entropy(logits, ids[:, 1:].contiguous()))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        turns.step()


def torchtitan(folder: Path, plan: dict[str, Any], turns: Turns) -> None:
    """torchtitan's Llama 3 model with its weight tying.

    Shims: its trainer wants a GPU or a simulated one and a process group, so the loop here calls its model in the
    order of its training step; gradients are clipped by torch, the loss is torch's (its own is a compiled torch one);
    attention is its own SDPA module, which its language models no longer choose (their flex attention has no backward
    on a CPU).
    """
    from torchtitan.models import llama3
    from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm
    from torchtitan.models.common.attention import ScaledDotProductAttention
    from torchtitan.models.llama3.model import Llama3Model

    llama3.get_attention_config = lambda backend: ScaledDotProductAttention.Config()
    shape = plan["model"]
    dim, heads, rows = shape["hidden_size"], shape["num_attention_heads"], shape["vocab_size"]
    init = {"weight": lambda tensor: torch.nn.init.normal_(tensor, std=0.02), "bias": torch.nn.init.zeros_}
    rope = ComplexRoPE.Config(dim=dim // heads, max_seq_len=plan["length"], theta=10000, scaling="none")
    config = Llama3Model.Config(
        dim=dim, vocab_size=rows, enable_weight_tying=True,
        tok_embeddings=Embedding.Config(num_embeddings=rows, embedding_dim=dim, param_init=init),
        norm=RMSNorm.Config(normalized_shape=dim, param_init={"weight": torch.nn.init.ones_}),
        lm_head=Linear.Config(in_features=dim, out_features=rows, param_init=init),
        layers=llama3._build_llama3_layers(
            n_layers=shape["num_hidden_layers"], dim=dim, n_heads=heads, hidden_dim=shape["intermediate_size"],
            rope=rope, attn_backend="sdpa", fuse_qkv=True,
        ),
    )  # fmt: skip
    model = config.build()
    model.init_states()
    optimizer, schedule = _adamw(model)
    turns.start()
    model.train()
    for ids in batches(folder, plan):
        logits = model(ids[:, :-1].contiguous())
        F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        turns.step()


def _adamw(model: torch.nn.Module) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / FOREVER))
    )


def _transformers_model(plan: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**plan["model"], "use_cache": False}
    model: torch.nn.Module = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), attn_implementation="sdpa"
    )
    return model


SIDES: dict[str, Callable[[Path, dict[str, Any], Turns], None]] = {
    "ours": ours,
    "compiled": lambda folder, plan, turns: ours(folder, plan, turns, compiled=True),
    "bare": bare,
    "hf_trainer": hf_trainer,
    "litgpt": litgpt,
    "torchtitan": torchtitan,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    place = Path(sys.argv[2])
    SIDES[sys.argv[1]](place, json.loads((place / "plan.json").read_text()), Turns(int(sys.argv[3])))
