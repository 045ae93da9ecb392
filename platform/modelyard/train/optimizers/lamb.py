"""LAMB: Adam's update, scaled for every tensor to its weight's norm (You et al. 2019, arXiv 1904.00962)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from modelyard.train.optimizers.base import ShardedOptimizer, local, whole_sums


class Lamb(ShardedOptimizer):
    """Made for batches of tens of thousands of sequences. Norms are those of whole tensors, whatever the sharding.

    Args:
        params: parameters or groups.
        lr: rate; an update has the length lr x the length of the weight.
        betas: decay of the two moments.
        eps: offset of the denominator.
        weight_decay: added to Adam's update before it is scaled (algorithm 2 of the paper). Groups without decay
            take Adam's update as it is: norms and biases have no scale of their own to go by.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        weights, updates = [local(p) for p in parameters], self._adam(group, parameters)
        decay = group["weight_decay"]
        if not decay:
            torch._foreach_add_(weights, updates, alpha=-group["lr"])
            return
        torch._foreach_add_(updates, weights, alpha=decay)
        sizes = _norms(weights, parameters)
        lengths = _norms(updates, parameters)
        for weight, update, size, length in zip(weights, updates, sizes, lengths, strict=True):
            trust = torch.where((size > 0) & (length > 0), size / length, torch.ones_like(size))
            weight.sub_(update.mul_(trust), alpha=group["lr"])

    def _adam(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Adam's bias-corrected update, before rate and decay."""
        first, second = group["betas"]
        count = self.count(parameters)
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        means, squares = self.kept(parameters, "mean"), self.kept(parameters, "square")
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        below = torch._foreach_sqrt(squares)
        torch._foreach_div_(below, (1 - second**count) ** 0.5)
        torch._foreach_add_(below, group["eps"])
        updates = torch._foreach_div(means, 1 - first**count)
        torch._foreach_div_(updates, below)
        return list(updates)


def _norms(parts: list[torch.Tensor], owners: list[torch.Tensor]) -> list[torch.Tensor]:
    squares = [part.square().sum() for part in parts]
    return [value.sqrt() for value in whole_sums(squares, owners)]
