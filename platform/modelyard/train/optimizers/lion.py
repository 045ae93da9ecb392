"""Lion: the sign of an interpolation between momentum and gradient (Chen et al. 2023, arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from modelyard.train.optimizers.base import ShardedOptimizer, local


class Lion(ShardedOptimizer):
    """One moment instead of Adam's two. The paper: a rate 3 to 10 times smaller than AdamW's, a decay as much larger.

    Args:
        params: parameters or groups.
        lr: rate.
        betas: of the interpolation for the update, and of the momentum.
        weight_decay: decoupled, as in AdamW.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        fast, slow = group["betas"]
        weights = [local(p) for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momenta = self.kept(parameters, "momentum")
        signs = torch._foreach_mul(momenta, fast)
        torch._foreach_add_(signs, gradients, alpha=1 - fast)
        torch._foreach_sign_(signs)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(weights, signs, alpha=-group["lr"])
        torch._foreach_mul_(momenta, slow)
        torch._foreach_add_(momenta, gradients, alpha=1 - slow)
