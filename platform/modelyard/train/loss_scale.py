"""Loss scaling for fp16: keeps small gradients above its smallest number (Micikevicius et al., arXiv 1710.03740)."""

from __future__ import annotations

import torch

_GROWTH_STEPS = 1000
"""Good steps before the scale doubles (Apex and torch: 2,000; an overflow costs one step)."""
_LOWEST = 2.0**-14


class LossScale:
    """A factor on the loss that halves when gradients overflow and doubles after many good steps.

    Losses here are sums over tokens, some thousands of times larger than means: the scale starts at 1, and finds its
    place either way. Its state is two tensors, so that checkpoints carry it; `state` shares their memory.
    """

    def __init__(self) -> None:
        self.state = {
            "loss_scale": torch.ones((), dtype=torch.float64),
            "good_steps": torch.zeros((), dtype=torch.int64),
        }

    @property
    def value(self) -> float:
        """What the loss is multiplied by."""
        return float(self.state["loss_scale"])

    @property
    def exhausted(self) -> bool:
        """Whether the scale is so low that overflow cannot be its fault."""
        return self.value <= _LOWEST

    def update(self, finite: bool) -> None:
        """Takes in whether the gradients of a step were finite."""
        scale, good = self.state["loss_scale"], self.state["good_steps"]
        if not finite:
            scale.mul_(0.5).clamp_(min=_LOWEST)
            good.zero_()
            return
        good.add_(1)
        if int(good) >= _GROWTH_STEPS:
            scale.mul_(2.0)
            good.zero_()
