"""The seam between the loop and parallelism: how the gradients of one optimizer step come about on a mesh.

The loop asks for gradients, for what they add up to, and for held-out losses; it knows no scheme. A `Strategy` is
what data-parallel, sharded and tensor-parallel layouts share; others (pipelines) override `forward_backward` and
`evaluate`. Whatever a strategy returns is this worker's additive share: summed over all workers it is the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from modelyard.train.clock import Clock
from modelyard.train.objective import Batch, Objective
from modelyard.train.optimizer import local_gradients, squared_norm
from modelyard.train.world import World

Sums = dict[str, torch.Tensor]


class Strategy:
    """Data parallelism, sharded or not: every worker has its own sequences and runs the whole model on them.

    Attributes:
        model: holds this worker's parameters under their names in the unsplit model.
        world: the workers.
        reader, readers: which share of every batch this worker reads, and how many shares there are.
        clock: where the time of a step is counted, by phase.
    """

    def __init__(self, model: nn.Module, world: World) -> None:
        self.model, self.world = model, world
        self.reader, self.readers = world.rank, world.size
        self.clock = Clock(world.device)

    @property
    def gradient_scale(self) -> float:
        """What turns the gradients left by `forward_backward` into sums over the global batch: FSDP averages."""
        return float(self.world.size)

    def forward_backward(self, objective: Objective, batches: Sequence[Batch], scale: float = 1.0) -> Sums:
        """Gradients of `scale` x loss over this worker's micro-batches; sums of loss, weight and further metrics.

        Workers exchange gradients only in the last micro-batch.
        """
        sums: Sums = {}
        for index, batch in enumerate(batches):
            self._communicate(index + 1 == len(batches))
            with self.clock("forward"):
                loss, metrics = objective(self.model, batch)
            with self.clock("backward"):
                (loss if scale == 1.0 else loss * scale).backward()  # type: ignore[no-untyped-call]
            add(sums, {"loss": loss, **metrics})
        return sums

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> Sums:
        """The same sums without gradients."""
        loss, metrics = objective(self.model, batch)
        return add({}, {"loss": loss, **metrics})

    def squared_norm(self) -> torch.Tensor:
        """This worker's share of the squared norm of all gradients, a float64 scalar."""
        return squared_norm(local_gradients(self.model.parameters()))

    def scale_gradients(self, factor: float) -> None:
        """Multiplies every gradient in place."""
        torch._foreach_mul_([g for g, _ in local_gradients(self.model.parameters())], factor)

    def _communicate(self, last: bool) -> None:
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last)


def add(sums: Sums, values: Mapping[str, torch.Tensor]) -> Sums:
    """Adds detached values to `sums` in float64, in place, and returns it."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().double()
    return sums
