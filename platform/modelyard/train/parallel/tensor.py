"""Tensor and sequence parallelism (Megatron, arXiv 1909.08053 and 2205.05198) put into a plain transformers model.

In every block attention and feed-forward are *regions*: the hidden states enter whole, the first matrices are split by
column, the last by row, and the region leaves one sum over the tensor axis. With sequence parallelism the hidden states
between regions are split along the sequence: entering is then a gather, leaving a reduce-scatter of the same volume.

Which matrix is split how comes from transformers' own `base_model_tp_plan`, or from `_PLANS` where it has none.
Split parameters become DTensors on the tensor axis, so that FSDP, checkpoints and norms know them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from modelyard.errors import RecipeError
from modelyard.models.nf4 import Nf4Linear
from modelyard.train.parallel import exchange
from modelyard.train.parallel.blocks import base_model, blocks, final_norm
from modelyard.train.parallel.split_adapters import split_adapter
from modelyard.train.parallel.split_layers import SplitLayer, VocabularyEmbedding, VocabularyHead, split_class

_PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "h.*.attn.c_attn": "fused_colwise",
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.c_fc": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    },
}
_IGNORED = ("packed_colwise", "moe_tp_experts", "grouped_gemm")
"""Experts are whole experts on some worker each (`experts.py`), never split by column."""


def split_tensors(model: PreTrainedModel, mesh: DeviceMesh, sequence: bool) -> list[str]:
    """Splits a model (on the meta device or not) over the one-dimensional `mesh`, in place.

    Adapters inside it stay whole (`split_adapters.py`): their gradients are terms.

    Args:
        model: a decoder, or the part of one that a pipeline stage holds.
        mesh: the tensor axis.
        sequence: split hidden states between regions along the sequence as well.

    Returns:
        Names of whole parameters whose gradients are terms: to be summed over the tensor axis after backward.

    Raises:
        RecipeError: the architecture has no plan.
    """
    base, group = base_model(model), mesh.get_group()
    plan = _plan(model)
    prefix = next((f"{name}." for name, module in model.named_modules() if module is base and name), "")
    regions: dict[int, nn.Module] = {}
    terms: list[str] = []
    modules = dict(model.named_modules())
    for name, module in list(modules.items()):
        style = _style(plan, name.removeprefix(prefix))
        if style is None:
            continue
        if style == "replicated_with_grad_allreduce":
            terms += [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            continue
        _become(cast(nn.Module, getattr(module, "base_layer", module)), style, mesh, sequence, name)
        terms += [f"{name}.{key}" for key in split_adapter(module)]
        region = modules[name.rpartition(".")[0]]
        regions[id(region)] = region
        if style == "fused_colwise":
            terms += [f"{name}.weight", f"{name}.bias"]
            region.split_size = region.split_size // mesh.size()
        elif style == "rowwise" and sequence and module.bias is not None:
            terms.append(f"{name}.bias")
    whole = _mixtures(model)
    for region in regions.values():
        _enter_at(region, group, sequence)
    _split_vocabulary(model, mesh)
    if sequence:
        for block in whole:
            _whole_region(block, group)
        _split_sequence(model, group)
        terms += _between(model, [*regions.values(), *whole])
    return terms


def _plan(model: PreTrainedModel) -> dict[str, str]:
    kind = str(model.config.model_type)
    plan: dict[str, str] | None = _PLANS.get(kind) or getattr(model.config, "base_model_tp_plan", None)
    known = ("colwise", "rowwise", "replicated_with_grad_allreduce", "fused_colwise")
    if plan:
        plan = {name: style for name, style in plan.items() if style not in _IGNORED and ".experts" not in name}
    if not plan or any(style not in known for style in plan.values()):
        raise RecipeError(
            f"there is no tensor-parallel plan for models of type {kind}",
            place="parallel.tensor",
            mend="use tensor: 1 with shard, or a Llama, Mistral, Qwen, Mixtral or GPT-2 model",
        )
    return plan


def _style(plan: dict[str, str], name: str) -> str | None:
    return plan.get(re.sub(r"\.\d+\.", ".*.", name, count=1))


def _become(module: nn.Module, style: str, mesh: DeviceMesh, sequence: bool, name: str) -> None:
    kind = split_class(module, style)
    if kind is None:
        raise RecipeError(
            f"{name} is a {type(module).__name__}, which is not split over the tensor axis",
            place="parallel.tensor",
            mend="use tensor: 1",
        )
    out = 1 if isinstance(module, Conv1D) else 0
    if isinstance(module, Nf4Linear):
        module.part = (0 if style == "colwise" else 1, mesh.size(), mesh.get_local_rank())
    elif style == "colwise":
        _distribute(module, {"weight": Shard(out), "bias": Shard(0)}, mesh)
    elif style == "rowwise":
        _distribute(module, {"weight": Shard(1 - out)}, mesh)
    module.__class__ = kind
    _told(module, mesh, sequence)


def _told(module: nn.Module, mesh: DeviceMesh, sequence: bool) -> None:
    layer = cast(SplitLayer, module)
    layer.tensor_group, layer.sequence = mesh.get_group(), sequence


def _distribute(module: nn.Module, placements: dict[str, Placement], mesh: DeviceMesh) -> None:
    for name, placement in placements.items():
        parameter = getattr(module, name)
        if parameter is not None:
            # Every rank holds the same values (or none yet): each keeps its part, nothing is sent.
            split = distribute_tensor(parameter.detach(), mesh, [placement], src_data_rank=None)
            setattr(module, name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def _enter_at(region: nn.Module, group: dist.ProcessGroup, sequence: bool) -> None:
    """Hidden states enter `region`: gathered where they are split, marked for summed gradients where they are not."""

    def change(x: torch.Tensor) -> torch.Tensor:
        return exchange.gather_terms(x, group, 1) if sequence else exchange.enter(x, group)

    region.register_forward_pre_hook(_on_hidden(change), with_kwargs=True)


def _whole_region(region: nn.Module, group: dist.ProcessGroup) -> None:
    """A block that every worker computes in the same way on whole sequences (a mixture of experts)."""
    region.register_forward_pre_hook(_on_hidden(lambda x: exchange.join(x, group, 1)), with_kwargs=True)
    region.register_forward_hook(_on_output(lambda x: exchange.cut(x, group, 1)))


def _split_sequence(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Hidden states are split at the first block and joined after the final norm (or the last block of a stage)."""
    layers, norm = blocks(model), final_norm(model)
    if layers:
        layers[0].register_forward_pre_hook(_on_hidden(lambda x: exchange.cut(x, group, 1)), with_kwargs=True)
        last = norm if isinstance(norm, nn.Module) else layers[-1]
        last.register_forward_hook(_on_output(lambda x: exchange.join(x, group, 1)))


def _on_hidden(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _on_output(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _mixtures(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, "experts") and hasattr(module, "gate")]


def _between(model: PreTrainedModel, regions: list[nn.Module]) -> Iterator[str]:
    """Whole parameters of blocks outside every region, and of the final norm: they see parts of the sequence."""
    inside = {id(p) for region in regions for p in region.parameters()}
    outside = [p for block in blocks(model) for p in block.parameters() if id(p) not in inside]
    norm = final_norm(model)
    if norm is not None:
        outside += list(norm.parameters())
    wanted = {id(p) for p in outside}
    return (name for name, p in model.named_parameters() if id(p) in wanted)


def _split_vocabulary(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Splits embedding and output layer by rows where the vocabulary divides; else both stay whole, and where rows of
    either are trained beside an adapter."""
    both = {VocabularyEmbedding: model.get_input_embeddings(), VocabularyHead: model.get_output_embeddings()}
    if any(hasattr(module, "base_layer") or hasattr(module, "original_module") for module in both.values()):
        return
    # A pipeline stage has one of them, or none.
    found = {kind: module for kind, module in both.items() if isinstance(module, (nn.Embedding, nn.Linear))}
    tied = len({id(module.weight) for module in found.values()}) < len(found)
    for kind, module in found.items():
        if module.weight.shape[0] % mesh.size():
            continue
        if kind is VocabularyHead and tied:
            module.weight = found[VocabularyEmbedding].weight
        else:
            _distribute(module, {"weight": Shard(0)}, mesh)
        if isinstance(module, nn.Linear) and module.bias is not None:
            _distribute(module, {"bias": Shard(0)}, mesh)
        module.__class__ = kind
        _told(module, mesh, sequence=False)
