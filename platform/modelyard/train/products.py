"""Products of one input with several matrices, LoRA updates included, as one step of autograd.

The input's gradient is a sum over the matrices, and an update adds to its layer's result: both are added up inside the
products (BLAS's beta = 1), where autograd would write each term to memory and add it in a pass of its own. Frozen
matrices get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Part:
    """What one layer multiplies by: y = x W^T + b + scale (x A^T) B^T.

    Attributes:
        weight: W [out, in].
        bias: b [out] or None.
        low, high: A [r, in] and B [out, r] of a LoRA update, or None.
        scale: what the update is multiplied by.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """All of them, in the order of :class:`_Products`."""
        return self.weight, self.bias, self.low, self.high


def part_of(layer: nn.Module) -> Part | None:
    """What `layer` multiplies by now; None where it does something else, or where hooks wait for its call."""
    if _plain(layer):
        return _whole(Part(cast(torch.Tensor, layer.weight), cast("torch.Tensor | None", layer.bias)))
    return _adapted_part(layer) if hasattr(layer, "lora_A") else None


def products(x: torch.Tensor, parts: Sequence[Part], pairs: Sequence[int] = ()) -> tuple[torch.Tensor, ...]:
    """The result of every part for `x` [..., in]: [..., out] each.

    `pairs`: for every part the number of heads whose two halves are interleaved in the result, value i of the first
    half beside value i of the second; 0 = none.
    """
    scales = tuple(part.scale for part in parts)
    tensors = [tensor for part in parts for tensor in part.tensors]
    heads = tuple(pairs) or (0,) * len(parts)
    return cast(tuple[torch.Tensor, ...], _Products.apply(x, scales, heads, *tensors))  # type: ignore[no-untyped-call]


class _Products(torch.autograd.Function):
    """`tensors`: weight, bias, low and high of every part."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scales: tuple[float, ...], heads: tuple[int, ...], *tensors: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        results: list[torch.Tensor] = []
        lows: list[torch.Tensor | None] = []
        for i, (scale, n) in enumerate(zip(scales, heads, strict=True)):
            weight, bias, low, high = (
                _paired(t, n if at != 2 else 0) for at, t in enumerate(tensors[4 * i : 4 * i + 4])
            )
            result = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
            lows.append(None)
            if low is not None and high is not None:
                lows[i] = rows @ low.t()
                result.addmm_(cast(torch.Tensor, lows[i]), high.t(), alpha=scale)
            results.append(result.view(*x.shape[:-1], -1))
        ctx.scales, ctx.heads = scales, heads
        ctx.save_for_backward(rows, *lows, *tensors)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        count, wants = len(slopes), ctx.needs_input_grad
        rows, *saved = ctx.saved_tensors  # asked for once: under recomputation it is made for the asking
        lows, tensors = saved[:count], saved[count:]
        total: torch.Tensor | None = None
        found: list[torch.Tensor | None] = []
        for i, (scale, n) in enumerate(zip(ctx.scales, ctx.heads, strict=True)):
            weight, _, low, high = (_paired(t, n if at != 2 else 0) for at, t in enumerate(tensors[4 * i : 4 * i + 4]))
            wanted = wants[3 + 4 * i : 7 + 4 * i]
            slope = slopes[i].reshape(-1, slopes[i].shape[-1])
            inner = None if low is None else (slope @ high).mul_(scale)
            if wants[0]:
                total = slope @ weight if total is None else total.addmm_(slope, weight)
                total = total if inner is None else total.addmm_(inner, low)
            found += [
                _unpaired(slope.t() @ rows, n) if wanted[0] else None,
                _unpaired(slope.sum(0), n) if wanted[1] else None,
                inner.t() @ rows if inner is not None and wanted[2] else None,
                _unpaired((slope.t() @ lows[i]).mul_(scale), n) if wanted[3] else None,
            ]
        whole = None if total is None else total.view(*slopes[0].shape[:-1], -1)
        return whole, None, None, *found


def _paired(tensor: Any, heads: int) -> Any:
    """Rows [heads * 2 * half, ...] with the two halves of every head interleaved."""
    if tensor is None or not heads:
        return tensor
    return tensor.view(heads, 2, -1, tensor[0].numel()).transpose(1, 2).reshape(tensor.shape)


def _unpaired(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`_paired`."""
    if not heads:
        return tensor
    return tensor.view(heads, -1, 2, tensor[0].numel()).transpose(1, 2).reshape(tensor.shape)


def _plain(layer: nn.Module) -> bool:
    # Exactly Linear's product: split, quantized and fp8 layers compute something else.
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward and not _hooked(layer)


def _hooked(layer: nn.Module) -> bool:
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return any(hooks) or "forward" in layer.__dict__


def _whole(part: Part) -> Part | None:
    """None where a tensor is a shard or of another type."""
    tensors = [tensor for tensor in part.tensors if tensor is not None]
    return part if all(t.dtype == torch.float32 and not isinstance(t, DTensor) for t in tensors) else None


def _adapted_part(layer: Any) -> Part | None:
    """The part of PEFT's LoRA layer where one plain adapter is on: no dropout, no DoRA, not merged."""
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(active) != 1 or active[0] in layer.lora_variant:
        return None
    name = active[0]
    low, high, drop = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    quiet = isinstance(drop, nn.Identity) or not layer.training
    if not quiet or not all(map(_plain, (layer.base_layer, low, high))) or high.bias is not None or _hooked(layer):
        return None
    return _whole(Part(layer.base_layer.weight, layer.base_layer.bias, low.weight, high.weight, layer.scaling[name]))
