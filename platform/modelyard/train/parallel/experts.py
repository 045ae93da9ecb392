"""Expert parallelism: the experts of a layer are spread over workers, and tokens travel to them and back.

Routing stays transformers' own; only what happens to the routed tokens is ours. Over the expert axis every worker has
other tokens: they are sorted by expert and exchanged by an uneven all-to-all, nothing is dropped or padded. Over the
tensor axis every worker has the same tokens: each computes its own experts and the sum is taken.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from modelyard.errors import RecipeError
from modelyard.train.parallel import exchange
from modelyard.train.parallel.mesh import Topology


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the stacked weights of a layer's experts."""
    return [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts")]


def split_experts(model: nn.Module, topology: Topology) -> None:
    """Keeps this worker's experts of every layer, over the expert axis or else the tensor axis, in place.

    Raises:
        RecipeError: the architecture stores its experts in a way that is not known here.
    """
    by_tensor = topology.sizes["expert"] == 1
    mesh = topology.dense["tensor"] if by_tensor else topology.sparse["expert"]
    forward = _shared_tokens if by_tensor else _own_tokens
    for layer in expert_layers(model):
        plain = not getattr(layer, "has_bias", False) and not getattr(layer, "is_transposed", False)
        if not plain or not isinstance(layer.gate_up_proj, nn.Parameter):
            raise RecipeError(
                f"experts of type {type(layer).__name__} are not split over workers",
                place="parallel.expert",
                mend="use expert: 1 and tensor: 1, or a Mixtral, Qwen-MoE or OLMoE model",
            )
        for name, parameter in list(layer.named_parameters(recurse=False)):
            _keep(layer, name, parameter, mesh)
        layer.forward = partial(forward, layer, mesh.get_group())


def _keep(layer: nn.Module, name: str, parameter: nn.Parameter, mesh: DeviceMesh) -> None:
    if parameter.shape[0] % mesh.size():
        raise RecipeError(
            f"{parameter.shape[0]} experts cannot be divided by {mesh.size()} workers",
            place="parallel.expert",
            mend="choose a divisor of the number of experts",
        )
    split = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
    setattr(layer, name, nn.Parameter(split, requires_grad=parameter.requires_grad))


def grouped(layer: Any, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Tokens [N, H] sorted by expert through this worker's experts; `counts` says how many each gets.

    Rows beyond the sum of `counts` come out undefined.
    """
    ends = counts.cumsum(0).to(torch.int32)
    up, down = (p.to_local() if isinstance(p, DTensor) else p for p in (layer.gate_up_proj, layer.down_proj))
    inner = layer._apply_gate(F.grouped_mm(tokens, up.transpose(-2, -1), offs=ends))
    return F.grouped_mm(inner, down.transpose(-2, -1), offs=ends)


def _own_tokens(
    layer: Any, group: dist.ProcessGroup, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts on several workers that all have other tokens: hidden [T, H], index and weights [T, k]."""
    workers, chosen = dist.get_world_size(group), index.shape[1]
    # A weight of zero is a choice over an expert's capacity: it does not travel.
    wanted = index.masked_fill(weights == 0, layer.num_experts).reshape(-1)
    order = wanted.argsort(stable=True)
    sent = torch.bincount(wanted, minlength=layer.num_experts + 1)[: layer.num_experts]
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    table = torch.stack([sent, received]).view(2, workers, -1)
    out, back = table.sum(-1).tolist()  # The one synchronisation: sizes must be known to exchange rows.
    order = order[: sum(out)]
    arrived = exchange.trade(hidden[order // chosen], group, out, back)
    # Rows arrive by worker, then by expert; the product wants all rows of an expert together.
    counts = table[1]
    local_experts = torch.arange(counts.shape[1], device=hidden.device).repeat(workers)
    by_expert = local_experts.repeat_interleave(counts.reshape(-1)).argsort(stable=True)
    if len(by_expert):
        done = grouped(layer, arrived[by_expert], counts.sum(0))
        done = torch.zeros_like(done).index_copy(0, by_expert, done)
    else:
        # No token came, but weights and exchange still belong to the graph of every worker.
        up, down = (p.to_local() for p in (layer.gate_up_proj, layer.down_proj))
        done = arrived + 0 * (up.sum() + down.sum())
    returned = exchange.trade(done, group, back, out)
    slots = returned.new_zeros(len(wanted), returned.shape[1]).index_copy(0, order, returned)
    return (slots.view(*index.shape, -1) * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def _shared_tokens(
    layer: Any, group: dist.ProcessGroup, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Experts on several workers that all have the same tokens: each computes its own, and the sum is taken."""
    mine, rank = layer.num_experts // dist.get_world_size(group), dist.get_rank(group)
    hidden, weights = exchange.enter(hidden, group), exchange.enter(weights, group)
    here = index - rank * mine
    foreign = ((here < 0) | (here >= mine) | (weights == 0)).reshape(-1)
    order = here.reshape(-1).masked_fill(foreign, mine).argsort(stable=True)
    counts = torch.bincount(here.reshape(-1).masked_fill(foreign, mine), minlength=mine + 1)[:mine]
    order = order[: int(counts.sum())]
    done = grouped(layer, hidden[order // index.shape[1]], counts)
    done = done * weights.reshape(-1)[order].unsqueeze(-1)
    out = torch.zeros_like(hidden).index_add(0, order // index.shape[1], done.to(hidden.dtype))
    return exchange.total(out, group)
