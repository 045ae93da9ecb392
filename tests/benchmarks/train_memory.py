"""Memory of a worker as the model is sharded over 1, 2 and 4 of them.

    python tests/benchmarks/train_memory.py

A 60 M Llama, fp32, AdamW, FSDP2 (ZeRO-3), one short sequence a worker. After two steps every worker adds up the bytes
of its parameters, gradients and optimizer state (storage as allocated, padding included). `ours` is the largest such
sum on the count (2 or 4) that does worse, `peer` that part of the sum on one: the ideal. `curve` lists
[workers, MiB of state a worker, MiB resident at the peak above the process before the model]; the peak holds the
gathered block and activations too.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import socket
import sys
import tempfile
from pathlib import Path

from contract import report, say

PRESET, LENGTH, TARGET = "llama-60m", 64, 1.10


def worker(rank: int, workers: int, port: int, out: str) -> None:
    """Two steps in one of `workers` processes; leaves its bytes in `out`."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(workers), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    import torch

    from modelyard.models import ModelOptions, build_config, build_on_meta
    from modelyard.train.objective import causal_lm
    from modelyard.train.optimizer import make_optimizer
    from modelyard.train.options import TrainOptions
    from modelyard.train.parallel.parallelize import parallelize
    from modelyard.train.parallel.strategy import local
    from modelyard.train.world import joined

    torch.set_num_threads(1)
    with joined() as world:
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        options = TrainOptions(global_batch=workers)
        strategy = parallelize(build_on_meta(build_config(ModelOptions(preset=PRESET), 32_000)), options, world)
        strategy.materialise(0)
        optimizer = make_optimizer(strategy.model, options)
        ids = torch.arange(LENGTH)[None] + rank
        batch = {"input_ids": ids, "document_ids": torch.zeros_like(ids)}
        for _ in range(2):
            optimizer.zero_grad(set_to_none=True)
            strategy.forward_backward(causal_lm, [batch])
            optimizer.step()
        held = [local(t) for p in strategy.model.parameters() for t in (p, p.grad) if t is not None]
        held += [local(t) for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) * 1024
        found = world.gather((sum(storages.values()), peak))
    if rank == 0:
        Path(out).write_text(json.dumps([max(state for state, _ in found), max(peak for _, peak in found)]))


def measure(workers: int, out: Path) -> tuple[float, float]:
    """MiB of state, and of the peak, on the worker that holds most."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=worker, args=(rank, workers, port, str(out))) for rank in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        sys.exit("a worker failed")
    state, peak = json.loads(out.read_text())
    return state / 2**20, peak / 2**20


def main() -> None:
    """Prints the result line."""
    curve: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in (1, 2, 4):
            state, peak = measure(workers, Path(folder) / "out.json")
            say(f"{workers} workers: {state:.0f} MiB of state each, peak {peak:.0f} MiB")
            curve.append([workers, state, peak])
    whole = curve[0][1]
    worst = max(curve[1:], key=lambda row: row[1] * row[0])
    report(
        "train_memory",
        unit="MiB a worker",
        ours=worst[1],
        peer=whole / worst[0],
        peer_name=f"1/{worst[0]:.0f} of one worker's parameters, gradients and optimizer",
        target=TARGET,
        better="less",
        curve=curve,
    )


if __name__ == "__main__":
    main()
