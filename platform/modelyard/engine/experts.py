"""A mixture of experts in place of a feed-forward network, on any device."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.adapters import Groups, product
from modelyard.engine.checkpoint import Experts
from modelyard.engine.weights import Mixture, Mlp

Run = Callable[[Mlp, str, Tensor, Groups], Tensor]
"""One feed-forward network on rows of h, with what adapters add to it under keys that begin with a name."""


def mix(mixture: Mixture, experts: Experts, layer: int, h: Tensor, groups: Groups, run: Run) -> Tensor:
    """Tokens grouped by expert, each expert one product over its tokens (Mixtral, arXiv:2401.04088).

    Args:
        mixture: router, experts and perhaps a shared one.
        experts: how many, how many a token uses, and whether their weights sum to one.
        layer: its index, for adapters.
        h: [tokens, hidden].
        groups: adapters and the rows of h that ask for them.
        run: see `Run`.

    Returns:
        [tokens, hidden].
    """
    scores = product(lambda x: F.linear(x, mixture.router), (layer, "router"), h, groups)
    weights, chosen = scores.float().softmax(-1).topk(experts.used, dim=-1)
    if experts.normalized:
        weights = weights / weights.sum(-1, keepdim=True)
    order = chosen.flatten().argsort(stable=True)
    counts = torch.bincount(chosen.flatten(), minlength=experts.count).tolist()
    rows, shares = order // experts.used, weights.flatten()[order].to(h.dtype)
    out, at = torch.zeros_like(h), 0
    for index, (expert, count) in enumerate(zip(mixture.experts, counts, strict=True)):
        if count:
            mine, name = rows[at : at + count], f"experts.{index}."
            theirs = _among(mine, (layer, name + "up"), (layer, name + "down"), groups)
            out.index_add_(0, mine, run(expert, name, h[mine], theirs) * shares[at : at + count, None])
            at += count
    if mixture.shared is not None and mixture.shared_gate is not None:
        gate = mixture.shared_gate
        open_ = product(lambda x: F.linear(x, gate), (layer, "shared_gate"), h, groups)
        out += torch.sigmoid(open_) * run(mixture.shared, "shared.", h, groups)
    return out


def _among(mine: Tensor, up: tuple[int, str], down: tuple[int, str], groups: Groups) -> Groups:
    """The adapters that change an expert, with their rows counted among `mine`."""
    return tuple(
        (adapter, None if rows is None else torch.isin(mine, rows).nonzero().flatten())
        for adapter, rows in groups
        if up in adapter.deltas or down in adapter.deltas
    )
