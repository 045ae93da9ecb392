"""PEFT's adapters around layers that are split over the tensor axis.

Their own tensors stay whole on every worker, under PEFT's names: they are a few percent of the model, FSDP shards them
like norms, and checkpoints, exports and engines see what they see of an unsplit model. A worker computes with the rows
and columns that belong to its part of the matrix, so that its gradient is a term of a sum over the tensor axis. The
update is added to the worker's own product, before that leaves the layer: it costs no exchange in forward, and one
small one a step.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from modelyard.train.parallel import exchange
from modelyard.train.parallel.split_layers import matrix_of


def split_adapter(module: nn.Module) -> list[str]:
    """Makes an adapter whose `base_layer` has been split compute this worker's part, in place.

    Returns the names of its own parameters, below `module`: their gradients are terms. None of a plain layer.
    """
    kind = _SplitLora if hasattr(module, "lora_A") else _SplitIa3 if hasattr(module, "ia3_l") else None
    if kind is None:
        return []
    given = type(module)
    module.__class__ = type(given.__name__, (kind, given), {"__module__": __name__})
    module.base_layer.bare = True  # type: ignore[union-attr]
    return [name for name, _ in module.named_parameters() if not name.startswith("base_layer.")]


class _SplitLora(nn.Module):
    """LoRA (arXiv 2106.09685) and DoRA (arXiv 2402.09353), with values as PEFT's layer has them."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = cast(Any, self)
        base: Any = own.base_layer
        product = base(x)
        for name in () if own.disable_adapters else own.active_adapters:
            if name in own.lora_A:
                product = _changed(own, name, x, product).to(product.dtype)
        return cast(torch.Tensor, base.leave(product))


def _changed(layer: Any, name: str, x: torch.Tensor, product: torch.Tensor) -> Any:
    """This worker's product with what adapter `name` makes of it."""
    base: Any = layer.base_layer
    low, high = base.columns(layer.lora_A[name].weight), base.rows(layer.lora_B[name].weight)
    drop, scale = layer.lora_dropout[name], layer.scaling[name]
    dropped = drop(x.to(low.dtype))
    update = F.linear(F.linear(dropped, low), high) * scale
    if name not in layer.lora_variant:
        return product + update
    with torch.no_grad():
        matrix = matrix_of(base).to(x.dtype)
        length = base.added((matrix + scale * (high @ low)).square().sum(1)).sqrt()
    factor = base.rows(layer.lora_magnitude_vector[name].weight) / length
    if isinstance(drop, nn.Identity) or not layer.training:
        bias = base.early_bias()
        plain = product if bias is None else product - bias
    else:
        plain = F.linear(dropped, matrix)
    return product + (factor - 1) * plain + factor * update


class _SplitIa3(nn.Module):
    """IA3 (arXiv 2205.05638): learned factors of a layer's input (feed-forward) or of its result."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = cast(Any, self)
        base: Any = own.base_layer
        active = [] if own.disable_adapters else [name for name in own.active_adapters if name in own.ia3_l]
        factor: Any = 1.0
        for name in active:
            factor = factor * own.ia3_l[name].flatten()
        if not active:
            return cast(torch.Tensor, base.leave(base(x)))
        if own.is_feedforward:
            return cast(torch.Tensor, base.leave(base((x * base.columns(factor)).to(x.dtype))))
        product, late = base(x), base.late_bias()
        if late is not None:  # multiplied too: each worker brings a share of it
            product = product + late / dist.get_world_size(base.tensor_group)
        return cast(torch.Tensor, base.summed((product * base.rows(factor)).to(product.dtype)))


def split_prefix(model: nn.Module, group: dist.ProcessGroup) -> list[str]:
    """Lets the learned keys and values of prefix tuning (arXiv 2101.00190) keep this worker's heads, in place.

    They come whole, [B, heads, tokens, D], from a prompt that every worker holds. Returns the names of its parameters,
    whose gradients are terms; none of another model.
    """
    learned: Any = model
    if getattr(getattr(model, "active_peft_config", None), "peft_type", None) != "PREFIX_TUNING":
        return []
    make = learned.get_prompt

    def own_heads(*args: Any, **kwargs: Any) -> Any:
        cache = make(*args, **kwargs)
        for layer in cache.layers:
            layer.keys, layer.values = (exchange.own(t, group, 1) for t in (layer.keys, layer.values))
        return cache

    learned.get_prompt = own_heads
    return [name for name, _ in model.named_parameters() if name.startswith("prompt_encoder.")]
