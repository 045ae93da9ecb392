"""Predicted against measured peak memory of a training worker: models x recompute x optimizer x shards x batch.

    python tests/benchmarks/planner_memory.py [--only TEXT]

Every configuration trains three steps in fresh processes (FSDP2 over gloo when sharded). Measured is the
peak of bytes held in tensors, from the allocation events of torch's profiler on a CPU, or
`torch.cuda.max_memory_allocated` where a GPU is at hand; both leave out the interpreter and libraries.
The ratio is predicted over measured of the worst configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
from typing import Any

from modelyard.planner import Layout
from modelyard.planner.memory import training_memory
from modelyard.planner.training import LOSS_CHUNK

LLAMA = {"model_type": "llama", "vocab_size": 4096, "max_position_embeddings": 2048}
SMALL = {**LLAMA, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
MIDDLE = {**LLAMA, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
          "num_key_value_heads": 4, "tie_word_embeddings": False}  # fmt: skip
LARGE = {**LLAMA, "vocab_size": 16384, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True}  # fmt: skip
QWEN = {**MIDDLE, "model_type": "qwen3", "head_dim": 64}
GPT2 = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 256, "n_layer": 6, "n_head": 4, "n_positions": 512,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
MIXTRAL = {**MIDDLE, "model_type": "mixtral", "num_local_experts": 4, "num_hidden_layers": 4}

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama-small", {"config": SMALL}),
    ("llama-small recompute", {"config": SMALL, "recompute": "full"}),
    ("llama-small sgd", {"config": SMALL, "optimizer": "sgd"}),
    ("llama-middle", {"config": MIDDLE}),
    ("llama-middle recompute", {"config": MIDDLE, "recompute": "full"}),
    ("llama-middle eager attention", {"config": MIDDLE, "attention": "eager", "micro_batch": 4}),
    ("llama-middle momentum, long", {"config": MIDDLE, "optimizer": "momentum", "micro_batch": 1,
                                     "sequence_length": 1024}),
    ("llama-small muon", {"config": SMALL, "optimizer": "muon", "micro_batch": 2}),
    ("llama-middle accumulated", {"config": MIDDLE, "micro_batches": 3, "micro_batch": 2}),
    ("llama-middle 2 shards", {"config": MIDDLE, "shards": 2}),
    ("llama-middle 2 shards recompute", {"config": MIDDLE, "shards": 2, "recompute": "full"}),
    ("llama-large", {"config": LARGE, "micro_batch": 2}),
    ("llama-large recompute", {"config": LARGE, "micro_batch": 2, "recompute": "full"}),
    ("llama-large tiny batch", {"config": LARGE, "micro_batch": 1, "sequence_length": 64}),
    ("llama-large unfused", {"config": LARGE, "micro_batch": 1, "sequence_length": 64, "optimizer": "adamw-foreach"}),
    ("llama-large 2 shards", {"config": LARGE, "micro_batch": 2, "shards": 2}),
    ("llama-large 2 shards accumulated", {"config": LARGE, "micro_batch": 1, "shards": 2, "micro_batches": 2}),
    ("llama-large 2 shards recompute sgd", {"config": LARGE, "micro_batch": 2, "shards": 2, "recompute": "full",
                                            "optimizer": "sgd"}),
    ("llama-middle fused loss", {"config": MIDDLE, "fused_loss": True}),
    ("llama-large fused loss, recompute", {"config": LARGE, "micro_batch": 4, "fused_loss": True, "recompute": "full"}),
    ("llama-large 2 shards fused loss", {"config": LARGE, "micro_batch": 2, "shards": 2, "fused_loss": True}),
    ("qwen3", {"config": QWEN}),
    ("gpt2", {"config": GPT2}),
    ("mixtral", {"config": MIXTRAL, "micro_batch": 4}),
]  # fmt: skip


def predicted(case: dict[str, Any]) -> float:
    """The planner's peak in bytes, without the process itself."""
    shards = case.get("shards", 1)
    name = case.get("optimizer", "adamw")
    layout = Layout(
        data=shards,
        shard=shards,
        micro_batch=case.get("micro_batch", 8),
        recompute=case.get("recompute", "none"),
        sync_each=False,
    )
    return training_memory(
        case["config"], sequence_length=case.get("sequence_length", 256), layout=layout,
        optimizer=name.removesuffix("-foreach"), fused_optimizer=not name.endswith("-foreach"),
        attention="eager" if case.get("attention") == "eager" else "flash",
        micro_batches=case.get("micro_batches", 1), loss_chunk=LOSS_CHUNK["cpu"] if case.get("fused_loss") else None,
    ).peak  # fmt: skip


def measured(case: dict[str, Any]) -> dict[str, float]:
    """Trains the case in `shards` processes and returns what rank 0 saw."""
    world = case.get("shards", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
    }  # fmt: skip
    command = [sys.executable, __file__, "--worker", json.dumps(case)]
    workers = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(world)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise RuntimeError(f"a worker failed: {outputs}")
    result: dict[str, float] = json.loads(outputs[0].strip().splitlines()[-1])
    return result


def worker(case: dict[str, Any]) -> None:
    """Builds the model, trains three steps and prints the peak of tensor bytes."""
    import resource

    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    cuda = torch.cuda.is_available() and case.get("shards", 1) == 1
    device = torch.device("cuda" if cuda else "cpu")
    if case.get("shards", 1) > 1:
        dist.init_process_group("gloo")
    model = _model(case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        _train(model, case, device)
    peak = _peak(trace)
    peak = torch.cuda.max_memory_allocated() if cuda else peak
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"peak": peak, "rss": rss}))
    if dist.is_initialized():
        dist.destroy_process_group()


def _peak(trace: Any) -> int:
    """Largest sum of live allocations, by address.

    Gloo frees its copies in threads the profiler does not see: an address that is handed out again was free.
    """
    from torch._C._profiler import _EventType

    changes: list[tuple[int, int, int]] = []
    waiting = list(trace.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size))
    live: dict[int, int] = {}
    held = peak = 0
    for _, address, change in sorted(changes, key=lambda c: c[0]):
        held -= live.pop(address, 0)
        if change > 0:
            live[address] = change
            held += change
        peak = max(peak, held)
    return peak


def _model(case: dict[str, Any]) -> Any:
    import torch
    import transformers as hf

    settings = {k: v for k, v in case["config"].items() if k != "model_type"}
    config = hf.AutoConfig.for_model(case["config"]["model_type"], **settings)
    config.use_cache = False
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config, attn_implementation=case.get("attention", "sdpa"))
    model.tie_weights()
    if case.get("recompute") == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if case.get("shards", 1) > 1:
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def _train(model: Any, case: dict[str, Any], device: Any) -> None:
    import torch

    from modelyard.models.build import materialise

    materialise(model, device)
    with torch.no_grad():
        for p in model.parameters():
            (p.to_local() if hasattr(p, "to_local") else p).normal_(0, 0.02)
        for buffer in model.buffers():
            buffer.zero_()
    model.train()
    optimizers = _optimizers(model, case.get("optimizer", "adamw"))
    shape = (case.get("micro_batch", 8), case.get("sequence_length", 256))
    for _ in range(3):
        for left in reversed(range(case.get("micro_batches", 1))):
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(left == 0)
            tokens = torch.randint(0, case["config"]["vocab_size"], shape, device=device)
            _loss(model, tokens, case.get("fused_loss", False)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def _loss(model: Any, tokens: Any, fused: bool) -> Any:
    import torch.nn.functional as F

    if fused:
        from modelyard.train.head import language_loss

        return language_loss(model, {"input_ids": tokens, "use_cache": False}, tokens.roll(-1, 1))[0]
    labels = tokens.roll(-1, 1).reshape(-1)
    logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.reshape(labels.shape[0], -1).float(), labels, reduction="sum")


def _optimizers(model: Any, name: str) -> list[Any]:
    import torch

    parameters = list(model.parameters())
    if name.startswith("adamw"):
        return [torch.optim.AdamW(parameters, fused=name == "adamw", foreach=name != "adamw")]
    if name in ("sgd", "momentum"):
        return [torch.optim.SGD(parameters, lr=0.1, momentum=0.9 * (name == "momentum"))]
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n and "head" not in n]
    rest = {id(p) for p in matrices}
    return [
        torch.optim.Muon(matrices, lr=0.01),
        torch.optim.AdamW([p for p in parameters if id(p) not in rest], fused=True),
    ]


def main() -> None:
    """Runs every case (or those whose name holds `--only`) and prints the contract's JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    ratios: dict[str, float] = {}
    for name, case in CASES:
        if arguments.only not in name:
            continue
        ours, seen = predicted(case), measured(case)
        ratios[name] = ours / seen["peak"]
        print(
            f"{name:36} predicted {ours / 2**20:8.1f} MiB  measured {seen['peak'] / 2**20:8.1f}  "
            f"{100 * (ratios[name] - 1):+6.1f} %  (RSS {seen['rss'] / 2**20:.0f})",
            file=sys.stderr, flush=True,
        )  # fmt: skip
    worst = max(ratios, key=lambda name: abs(ratios[name] - 1))
    error = abs(ratios[worst] - 1)
    print(json.dumps({
        "name": "planner_memory", "unit": "predicted/measured", "ours": ratios[worst], "peer": 1.0,
        "peer_name": "measured", "ratio": ratios[worst], "target": 0.1, "pass": error <= 0.1, "max_error": error,
        "median_error": statistics.median(abs(r - 1) for r in ratios.values()), "configurations": len(ratios),
        "worst": worst, "errors": {name: round(ratio - 1, 4) for name, ratio in ratios.items()},
    }))  # fmt: skip


if __name__ == "__main__":
    main()
