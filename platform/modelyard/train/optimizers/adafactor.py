"""Adafactor: second moments as an outer product of rows and columns (Shazeer and Stern 2018, arXiv 1804.04235).

torch has one, which this is equal to in one process; torch's fails on sharded parameters (2.13: in-place operations on
partial sums).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate

from modelyard.train.optimizers.base import ShardedOptimizer, local, whole_sums

_DECAY = -0.8
_SMALLEST_SCALE = 1e-3
"""Decay of the second moment is 1 - n^-0.8, and a tensor's step is relative to its size, at least 1e-3 (section 9)."""


class Adafactor(ShardedOptimizer):
    """State of rows + columns instead of twice rows x columns; no momentum; steps relative to a tensor's size.

    Args:
        params: parameters or groups.
        lr: rate relative to the root mean square of a tensor, at most 1/sqrt(n) (paper: 1e-2).
        weight_decay: decoupled.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        count, rate = self.count(parameters), float(group["lr"])
        sizes = _roots([p.detach() for p in parameters])
        updates = [self._direction(p, count) for p in parameters]
        lengths = _roots(updates)
        for parameter, update, size, length in zip(parameters, updates, sizes, lengths, strict=True):
            step = size.clamp_min(_SMALLEST_SCALE) * min(rate, count**-0.5) / length.clamp_min(1.0)
            weight = local(parameter)
            weight.mul_(1 - rate * group["weight_decay"])
            weight.sub_(local(update) * step)

    def _direction(self, parameter: torch.Tensor, count: int) -> torch.Tensor:
        """Gradient over the root of the estimated second moment."""
        gradient, fresh = parameter.grad, count**_DECAY
        assert gradient is not None
        square, tiny = gradient * gradient, torch.finfo(gradient.dtype).eps
        if gradient.ndim < 2:
            moment = self._followed(parameter, "square", square, fresh)
        else:
            rows = self._followed(parameter, "rows", _mean(square, -1), fresh)
            columns = self._followed(parameter, "columns", _mean(square, -2), fresh)
            moment = rows / _mean(rows, -2).clamp(min=tiny) * columns
        return gradient * moment.clamp(min=tiny * tiny).rsqrt()

    def _followed(self, parameter: torch.Tensor, name: str, value: torch.Tensor, share: float) -> torch.Tensor:
        """The state `name` after `share` of `value` came in."""
        state = self.state[parameter]
        if name not in state:
            state[name] = torch.zeros_like(value)
        kept: torch.Tensor = state[name]
        local(kept).lerp_(local(value), share)
        return kept


def _mean(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Mean over a dimension that stays with size 1; whole where that dimension is sharded."""
    total = tensor.sum(dim=dim, keepdim=True)
    if isinstance(total, DTensor):
        total = total.redistribute(placements=[Replicate() if isinstance(p, Partial) else p for p in total.placements])
    return total / tensor.shape[dim]


def _roots(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Root mean square of each whole tensor."""
    squares = whole_sums([local(tensor).square().sum() for tensor in tensors], tensors)
    return [(square / tensor.numel()).sqrt() for square, tensor in zip(squares, tensors, strict=True)]
