"""Applies a layout to a plain model, in a fixed order: compile each block, then shard each block, then the rest."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from modelyard.train.fp8 import to_fp8
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.mesh import build_mesh, degrees
from modelyard.train.world import World


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer: the members of its longest `ModuleList`."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len) if lists else []


def compute_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for or the device is made for it. bf16 on a CPU without bf16 units is 10x slower."""
    if options.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    # What fp8 does not multiply (norms, attention, the output layer) is bf16.
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    return known[options.precision]


def parallelize(model: nn.Module, options: TrainOptions, world: World) -> nn.Module:
    """Compiles and shards `model` in place and returns it. Weights may still be on the meta device.

    Weights stay fp32 and gradients are reduced in fp32 whatever the compute dtype.

    Raises:
        ResourceError: the mesh degrees do not multiply to the number of workers, or there are no fp8 units.
    """
    sizes = degrees(options.parallel, world.size)
    if options.precision == "fp8":
        to_fp8(blocks(model), world.device)
    if options.compile:
        for block in blocks(model):
            block.compile()
        model.compiled_loss = True  # type: ignore[assignment]  # read by train.head
    if world.size == 1:
        return model
    mesh = build_mesh(sizes, world.device.type)
    dtype = compute_dtype(options, world.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": options.parallel.reshard}
    if dtype == torch.float32:
        settings.pop("mp_policy")
    for block in blocks(model):
        fully_shard(block, **settings)
    return cast(nn.Module, fully_shard(model, **settings))
