"""A mixture of experts in place of a feed-forward network, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.checkpoint import Experts
from modelyard.engine.weights import Mixture, Mlp


def mix(mixture: Mixture, experts: Experts, h: Tensor, run: Callable[[Mlp, Tensor], Tensor]) -> Tensor:
    """Tokens grouped by expert, each expert one product over its tokens (Mixtral, arXiv:2401.04088).

    Args:
        mixture: router, experts and perhaps a shared one.
        experts: how many, how many a token uses, and whether their weights sum to one.
        h: [tokens, hidden].
        run: one feed-forward network on rows of h.

    Returns:
        [tokens, hidden].
    """
    weights, chosen = F.linear(h, mixture.router).float().softmax(-1).topk(experts.used, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts.count).tolist()
    rows, scores = order // experts.used, weights.flatten()[order].to(h.dtype)
    out, at = torch.zeros_like(h), 0
    for expert, count in zip(mixture.experts, counts, strict=True):
        if count:
            mine = rows[at : at + count]
            out.index_add_(0, mine, run(expert, h[mine]) * scores[at : at + count, None])
            at += count
    if mixture.shared is not None and mixture.shared_gate is not None:
        out += torch.sigmoid(F.linear(h, mixture.shared_gate)) * run(mixture.shared, h)
    return out
