"""Muon: momentum whose matrices are made orthogonal (Jordan 2024; scale of Liu et al. 2025, arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from modelyard.train.optimizers.base import ShardedOptimizer, local

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Jordan's quintic: steepest at zero, so that small singular values reach about 1 in five rounds."""


class Muon(ShardedOptimizer):
    """For the matrices of hidden layers; embeddings, output layer, norms and biases belong to AdamW.

    An update has the root mean square 0.2, about AdamW's (arXiv 2502.16982, equation 4): rate and decay of AdamW serve.
    A sharded matrix is gathered, made orthogonal by every worker alike and cut again: memory for one whole matrix at a
    time, arithmetic of one process.

    Args:
        params: matrices, or groups of them.
        lr: rate.
        momentum: decay of the (Nesterov) momentum.
        weight_decay: decoupled.
        rounds: Newton-Schulz iterations.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        rounds: int = 5,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "rounds": rounds})

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        keep = group["momentum"]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momenta = self.kept(parameters, "momentum")
        torch._foreach_lerp_(momenta, gradients, 1 - keep)
        ahead = torch._foreach_lerp(gradients, momenta, keep)
        for parameter, update in zip(parameters, ahead, strict=True):
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.sub_(_orthogonal_part(parameter, update, group["rounds"]), alpha=group["lr"])


def _orthogonal_part(parameter: torch.Tensor, update: torch.Tensor, rounds: int) -> torch.Tensor:
    """This worker's part of the orthogonalised whole of `update`, scaled."""
    scale = 0.2 * max(parameter.shape[-2:]) ** 0.5
    if not isinstance(parameter, DTensor):
        return orthogonal(update, rounds).mul_(scale)
    mesh, placements = parameter.device_mesh, parameter.placements
    whole: torch.Tensor = DTensor.from_local(
        update, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    ).full_tensor()
    # src_data_rank=None: every worker has computed the same whole, so nothing is sent.
    cut = distribute_tensor(orthogonal(whole, rounds) * scale, mesh, placements, src_data_rank=None)
    return local(cut)


def orthogonal(matrix: torch.Tensor, rounds: int = 5) -> torch.Tensor:
    """Newton-Schulz: roughly U V^T of `matrix` = U S V^T (singular values between 0.7 and 1.2); [..., m, n].

    bf16 on CUDA, as its authors do; fp32 on a CPU, where bf16 products are emulated and 100 times slower.
    """
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x: torch.Tensor = matrix.to(torch.bfloat16 if matrix.device.type == "cuda" else torch.float32)
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x if wide else x.mT).to(matrix.dtype)
