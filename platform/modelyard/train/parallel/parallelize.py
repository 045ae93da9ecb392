"""Applies a layout to a plain model, in a fixed order.

Pipeline stages are cut out first; in each: tensors (and experts, context) are split, blocks recompute, blocks are
compiled, and FSDP shards each block, then the rest. Every step works on what the one before left.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.models.nf4 import quantized_layers
from modelyard.train.cpu_attention import use_kernels
from modelyard.train.fp8 import to_fp8
from modelyard.train.fused import fuse
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.blocks import blocks
from modelyard.train.parallel.compress import Compression
from modelyard.train.parallel.context import split_context
from modelyard.train.parallel.experts import expert_layers, split_experts
from modelyard.train.parallel.flex import use_flex
from modelyard.train.parallel.layout import check_layout, degrees, sequence_parallel
from modelyard.train.parallel.mesh import Topology, build_topology
from modelyard.train.parallel.pipeline import Pipeline, cut_stages
from modelyard.train.parallel.recompute import recompute
from modelyard.train.parallel.routing import find_routing
from modelyard.train.parallel.split_adapters import split_prefix
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.parallel.tensor import split_tensors
from modelyard.train.world import World


def compute_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    """bf16 where it is asked for or the device is made for it. bf16 on a CPU without bf16 units is 10x slower."""
    if options.precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    # What fp8 does not multiply (norms, attention, the output layer) is bf16.
    known = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
    return known[options.precision]


def parallelize(model: nn.Module, options: TrainOptions, world: World) -> Strategy:
    """Cuts, compiles and shards `model` in place. Weights may still be on the meta device (`Strategy.materialise`).

    Weights stay fp32 and gradients are reduced in fp32 whatever the compute dtype.

    Raises:
        ResourceError: the mesh degrees do not multiply to the number of workers, or the device cannot do what the
            options ask for (fp8, flex attention).
        RecipeError: the model cannot be cut that way.
    """
    sizes = degrees(options.parallel, world.size)
    if options.attention == "flex":
        use_flex(model, world.device)
    else:
        use_kernels(model, world.device)
    if options.precision == "fp8":
        _check_fp8(model)
        to_fp8(blocks(model), world.device)
    routing = find_routing(model, options.routing)  # of the whole model: stages number their routers by it
    strategy = _laid_out(model, options, world, sizes)
    strategy.route(routing)
    if options.compress is not None:
        strategy.compression = Compression(options.compress, options.global_batch)
    return strategy


def _laid_out(model: nn.Module, options: TrainOptions, world: World, sizes: dict[str, int]) -> Strategy:
    if world.size == 1:
        _local_steps(model, options)
        return Strategy(model, world)
    config = getattr(model, "config", None)
    check_layout(options, world.size, None if config is None else config.to_dict())
    name, plain = _plain(model, sizes)
    topology = build_topology(sizes, world)
    if sizes["pipeline"] == 1:
        # Learned vectors make sequences longer by any number: hidden states stay whole between regions.
        sequence = sequence_parallel(options.parallel) and not _learned(model)
        terms = [] if plain is None else [name + term for term in _split(plain, sequence, topology)]
        if sizes["tensor"] > 1:
            terms += split_prefix(model, topology.group("tensor"))
        _local_steps(model, options)
        _shard(model, options, topology, world)
        return Strategy(model, world, topology, terms, averaged=False)
    stages = cut_stages(cast(PreTrainedModel, model), topology, options.parallel)
    terms = []
    for _, stage in stages:
        terms += _split(stage, sequence_parallel(options.parallel), topology)
        _local_steps(stage, options)
        _shard(stage, options, topology, world)
    return Pipeline(stages, world, topology, options, terms)


def _plain(model: nn.Module, sizes: dict[str, int]) -> tuple[str, PreTrainedModel | None]:
    """Name and value of the transformers model in `model`, which may stand under an adapter; None = there is none.

    Raises RecipeError where it, or its adapter, cannot be split as `sizes` say.
    """
    inner = getattr(model, "get_base_model", lambda: model)()
    known = isinstance(inner, PreTrainedModel)
    allowed = set(sizes) if known and inner is model else {"data", "shard", *(("tensor",) if known else ())}
    if known and inner is not model and not _learned(model):
        allowed |= {"context", "expert"}
    refused = [name for name, size in sizes.items() if size > 1 and name not in allowed]
    if refused:
        raise RecipeError(
            f"a {type(model).__name__} is not split by {refused[0]}",
            place=f"parallel.{refused[0]}",
            mend=f"use {', '.join(sorted(allowed))}",
        )
    if max(sizes["tensor"], sizes["expert"]) > 1 and any(hasattr(m, "lora_A") and _stacked(m) for m in model.modules()):
        raise RecipeError(
            "adapters of experts are not split",
            place="adapter.lora.targets",
            mend="choose the attention's layers, such as q_proj, v_proj and o_proj, or use tensor: 1 and expert: 1",
        )
    name = next((f"{name}." for name, module in model.named_modules() if module is inner and name), "")
    return name, cast(PreTrainedModel, inner) if known else None


def _stacked(layer: nn.Module) -> bool:
    """Whether an adapter's layer changes the stacked matrices of a layer's experts."""
    return bool(expert_layers(cast(nn.Module, layer.base_layer)))


def _learned(model: nn.Module) -> bool:
    """Whether learned vectors stand before what the model reads."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _split(model: PreTrainedModel, sequence: bool, topology: Topology) -> list[str]:
    """Splits layers over the tensor, expert and context axes; names of parameters whose gradients stay terms."""
    sizes, terms = topology.sizes, []
    if sizes["expert"] > 1 or sizes["tensor"] > 1:
        split_experts(model, topology)
    if sizes["tensor"] > 1:
        terms = split_tensors(model, topology.dense["tensor"], sequence)
    if sizes["context"] > 1:
        split_context(model, topology.group("context"))
    return terms


def _local_steps(model: nn.Module, options: TrainOptions) -> None:
    # Experts are chosen by rounding where two are close: models with experts keep the rounding they had.
    if not options.compile and options.recompute != "selective" and not expert_layers(model):
        fuse(model)
    for block in blocks(model):
        if options.recompute != "none":
            recompute(block, options.recompute)
        if options.compile:
            block.compile()
    if options.compile:
        model.compiled_loss = True  # type: ignore[assignment]  # read by train.head


def _shard(model: nn.Module, options: TrainOptions, topology: Topology, world: World) -> None:
    """FSDP over everything but plain replicas (DDP) and workers that share nothing."""
    mesh, sizes = topology.fsdp, topology.sizes
    dtype = compute_dtype(options, world.device)
    if mesh is None and dtype != torch.float32:
        mesh = topology.dense["fsdp"]  # One worker: nothing to share, but the policy casts.
    if mesh is None or sizes["data"] == world.size:
        return
    settings: dict[str, Any] = {"reshard_after_forward": options.parallel.reshard}
    if dtype != torch.float32:
        settings["mp_policy"] = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32
        )
    if options.parallel.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    alone = _shard_experts(model, topology, settings)
    units = blocks(model)
    for block in units:
        _shard_quantized(block, mesh, settings)
        fully_shard(block, mesh=mesh, ignored_params=alone, **settings)
    fully_shard(model, mesh=mesh, ignored_params=alone, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Gradients are sums; the loop divides by the global weight, which no worker knows before the end.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _prefetch(units, options.parallel.prefetch)


def _shard_quantized(block: nn.Module, mesh: DeviceMesh, settings: dict[str, Any]) -> None:
    """Matrices in four bits travel as they are, in a group of their own: a policy of types would cast the codes."""
    layers: list[nn.Module] = [layer for _, layer in quantized_layers(block)]
    if layers:
        fully_shard(layers, mesh=mesh, **{name: value for name, value in settings.items() if name != "mp_policy"})


def _check_fp8(model: nn.Module) -> None:
    if quantized_layers(model):
        raise RecipeError(
            "matrices in four bits are multiplied in bf16, not in fp8",
            place="precision",
            mend="use precision: auto, or leave adapter.lora.quantize out",
        )


def _shard_experts(model: nn.Module, topology: Topology, settings: dict[str, Any]) -> set[nn.Parameter]:
    """Shards experts over their own mesh; returns those that no other worker shares."""
    if topology.sizes["expert"] == 1:
        return set()
    mesh: DeviceMesh | None = topology.expert_fsdp
    alone: set[nn.Parameter] = set()
    for experts in expert_layers(model):
        if mesh is None:
            alone |= set(experts.parameters())
        else:
            fully_shard(experts, mesh=mesh, **settings)
    return alone


def _prefetch(units: list[nn.Module], ahead: int) -> None:
    """Gathers the parameters of `ahead` blocks while one computes; one ahead is what FSDP does by itself."""
    if ahead == 1:
        return
    for index, unit in enumerate(cast(list[FSDPModule], units)):
        unit.set_modules_to_forward_prefetch(cast(Any, units[index + 1 : index + 1 + ahead]))
        unit.set_modules_to_backward_prefetch(cast(Any, units[max(0, index - ahead) : index][::-1]))
