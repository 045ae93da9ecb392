"""Model FLOPs utilisation of the training loop on one GPU, against plain transformers with AdamW.

    python tests/benchmarks/train_gpu.py [--preset llama-1b] [--micro 4] [--global-batch 8] [--steps 12]

A dense Llama of 1.24 B, sequences of 4,096, bf16 autocast over fp32 weights, fused AdamW, clipping; ours compiles its
blocks and never makes the logits whole. The peer is a transformers model in a loop as anyone would write it, with the
same weights, tokens, precision and attention (PyTorch's), and micro-batches as large as ours where they fit. The peak
is the rate of an 8,192-wide bf16 product of random numbers, measured on the card in the same run. `mfu` counts
attention in full, as PaLM (arXiv:2204.02311) and Megatron-LM do, `mfu_causal` only what a causal mask leaves.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contract import report, say

from modelyard.models.presets import PRESETS
from modelyard.planner.flops import flops_per_token
from modelyard.planner.hardware import find_gpu
from modelyard.planner.training import DEVICE_BYTES, estimate_training
from modelyard.tokens import Sequences, TokenWriter

LENGTH, TARGET, WARM = 4096, 0.55, 4
PRECISION: Any = "bf16"

Measured = tuple[list[float], list[float]]
"""Seconds and losses of every step."""


def matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of a bf16 product of random matrices, the median of its runs."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=torch.bfloat16)
    seconds = []
    for turn in range(repeats + 5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        if turn >= 5:
            seconds.append(time.perf_counter() - began)
    return float(2 * size**3 / statistics.median(seconds) / 1e12)


def ours(
    shape: dict[str, Any], rows: np.ndarray, batch: int, micro: int, steps: int
) -> tuple[list[float], list[float]]:
    """Seconds and losses of every step of our loop; says where the time goes."""
    from modelyard.models import ModelOptions, build_config, build_on_meta, initialise
    from modelyard.models.build import materialise
    from modelyard.tokens import TokenDataset
    from modelyard.train.loop import Job, fit
    from modelyard.train.objective import causal_lm
    from modelyard.train.optimizer import make_optimizer
    from modelyard.train.options import TrainOptions
    from modelyard.train.parallel.parallelize import parallelize
    from modelyard.train.world import World

    world = World(0, 1, torch.device("cuda", 0))
    built = build_on_meta(build_config(ModelOptions(config=shape), shape["vocab_size"]))
    materialise(built, world.device)
    initialise(built, 0)
    options = TrainOptions(
        steps=steps, global_batch=batch, micro_batch=micro, learning_rate=1e-4, compile=True, precision=PRECISION,
        schedule="constant", warmup=0,
    )  # fmt: skip
    model = parallelize(built, options, world).model
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        writer = TokenWriter(Path(folder) / "train", LENGTH, shape["vocab_size"])
        writer.add(Sequences(rows, np.zeros(rows.shape, dtype=bool), np.full(len(rows), LENGTH)))
        writer.close(len(rows), rows.size)
        data = TokenDataset.open(Path(folder) / "train")
        job = Job(
            model, make_optimizer(model, options), causal_lm, data, LENGTH, options,
            sink=lambda metrics: seconds.append(metrics.seconds),
        )  # fmt: skip
        outcome = fit(job, world)
    say(f"  phases: { {name: round(value, 4) for name, value in outcome.phases.items()} }")
    return seconds, [row["loss"] for row in outcome.history]


def plain(
    shape: dict[str, Any], rows: np.ndarray, batch: int, micro: int, steps: int
) -> tuple[list[float], list[float]]:
    """The same of a transformers model in a hand-written loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**{name: value for name, value in shape.items() if name != "model_type"})
    config._attn_implementation = "sdpa"
    with torch.device("cuda"):
        model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    seconds, losses = [], []
    for step in range(steps):
        began = time.perf_counter()
        total = 0.0
        for start in range(step * batch, (step + 1) * batch, micro):
            ids = torch.from_numpy(rows[start : start + micro]).cuda()
            with torch.autocast("cuda", torch.bfloat16):
                logits = model(input_ids=ids, use_cache=False).logits
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
            (loss * micro / batch).backward()
            total += float(loss.detach()) * micro / batch
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        losses.append(total)
    return seconds, losses


def predicted(shape: dict[str, Any], batch: int, micro: int) -> dict[str, float] | None:
    """What the planner says of our side on this card: seconds a step and peak GiB; None for a card it does not know."""
    card = find_gpu(torch.cuda.get_device_name())
    if card is None:
        return None
    estimate = estimate_training(
        shape, batch * LENGTH, LENGTH, batch, hardware=card, micro_batch=micro, precision_name="mixed", fused_loss=True
    )
    return {"step_s": estimate.seconds, "peak_gib": (estimate.memory_bytes - DEVICE_BYTES) / 2**30}


def fitting(side: Any, shape: dict[str, Any], rows: np.ndarray, batch: int, micro: int, steps: int) -> Any:
    """Seconds, losses, micro-batch and peak GiB of a side, with the largest micro-batch that fits."""
    while True:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            seconds, losses = side(shape, rows, batch, micro, steps)
            return seconds, losses, micro, torch.cuda.max_memory_allocated() / 2**30
        except torch.OutOfMemoryError:
            if micro == 1:
                raise
            micro //= 2
            say(f"  out of memory: micro-batch {micro}")


def main() -> None:
    """Prints the result as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llama-1b")
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--global-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--precision", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--no-peer", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("train_gpu needs a CUDA GPU")
    shape = PRESETS[args.preset].config()
    global PRECISION
    PRECISION = args.precision
    # As many as are trained on: no row is seen twice, so that both sides' losses can be compared.
    rows = np.random.default_rng(0).integers(0, shape["vocab_size"], (args.steps * args.global_batch, LENGTH))
    peak = matmul_tflops()
    say(f"{torch.cuda.get_device_name()}: {peak:.0f} TFLOP/s of bf16 products")
    rate, found = {}, {}
    for name, side in (("ours", ours), ("plain", plain))[: 1 if args.no_peer else 2]:
        seconds, losses, micro, memory = fitting(side, shape, rows, args.global_batch, args.micro, args.steps)
        median = statistics.median(seconds[WARM:])
        rate[name] = args.global_batch * LENGTH / median
        found[name] = {"step_s": median, "first_step_s": seconds[0], "micro": micro, "peak_gib": memory,
                       "losses": [losses[0], losses[-1]]}  # fmt: skip
        say(f"{name}: {rate[name]:,.0f} tokens/s, {found[name]}")
    per_token = {how: flops_per_token(shape, LENGTH, attention=how).model for how in ("full", "causal")}  # type: ignore[arg-type]
    mfu = {f"{name}_{how}": rate[name] * f / peak / 1e12 for name in rate for how, f in per_token.items()}
    report(
        "train_gpu",
        unit="MFU",
        ours=mfu["ours_full"],
        peer=TARGET,
        peer_name="target share of the matmul rate",
        target=1.0,
        mfu=mfu["ours_full"],
        mfu_causal=mfu["ours_causal"],
        mfu_plain=mfu.get("plain_full"),
        matmul_tflops=peak,
        ratio_plain=rate["ours"] / rate["plain"] if "plain" in rate else None,
        predicted=predicted(shape, args.global_batch, found["ours"]["micro"]),
        precision=PRECISION,
        tokens_per_second=rate,
        sides=found,
        device=torch.cuda.get_device_name(),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
