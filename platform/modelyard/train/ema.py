"""Exponential moving average of the weights (Polyak and Juditsky 1992): sharded like them, and in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from modelyard.train.optimizers.base import local


class Ema:
    """Averages of the trainable parameters; each worker holds those of its shards.

    Args:
        model: whose parameters are averaged; starts from them as they are.
        decay: share of the old average that stays at an update. Early it is (1 + n) / (10 + n) after n updates
            where that is less, so that the initial weights are soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self._parameters = [p for _, p in named]
        self._averages = [p.detach().clone() for p in self._parameters]
        self._updates = torch.zeros((), dtype=torch.int64)
        self.state: dict[str, torch.Tensor] = {
            **{f"ema.{name}": average for (name, _), average in zip(named, self._averages, strict=True)},
            "ema_updates": self._updates,
        }

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights of a step in."""
        n = int(self._updates)
        decay = min(self._decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(
            [local(a) for a in self._averages], [local(p.detach()) for p in self._parameters], 1 - decay
        )
        self._updates.add_(1)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds the averages inside, its own weights again after. Swaps in place, one tensor at a time."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def adopt(self) -> None:
        """The model holds the averages from now on, and this object the last weights."""
        self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self._parameters, self._averages, strict=True):
            weight, other = local(parameter.detach()), local(average)
            held = weight.clone()
            weight.copy_(other)
            other.copy_(held)
