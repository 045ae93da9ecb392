"""What the optimizers of this folder share: the walk over parameters, shards, and sums over shards."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part of a tensor, sharing its memory; the tensor itself where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class ShardedOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` whose `update` gets a group's parameters that have gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every group; `closure` is called first, with gradients enabled, where there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self.update(group, parameters)
        return loss

    def update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        """Changes `parameters` of one group in place."""
        raise NotImplementedError

    def kept(self, parameters: Sequence[torch.Tensor], name: str) -> list[torch.Tensor]:
        """The state `name` of every parameter, zeros like it at first; local parts."""
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [local(self.state[parameter][name]) for parameter in parameters]

    def count(self, parameters: Sequence[torch.Tensor]) -> int:
        """Updates made so far, this one included. Kept as a tensor, so that checkpoints carry it."""
        for parameter in parameters:
            self.state[parameter].setdefault("step", torch.zeros((), dtype=torch.float32))
            self.state[parameter]["step"] += 1
        return int(self.state[parameters[0]]["step"])


def whole_sums(values: Sequence[torch.Tensor], owners: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Sums over a sharded tensor from each worker's sums over its part.

    `values[i]` is a scalar computed on the local part of `owners[i]`. Values of one mesh and sharding travel together:
    one all-reduce an axis instead of one a parameter.
    """
    found = list(values)
    for (mesh, axes), members in _by_sharding(owners).items():
        together = torch.stack([values[i] for i in members])
        for axis in axes:
            dist.all_reduce(together, group=mesh.get_group(axis))
        for i, value in zip(members, together.unbind(), strict=True):
            found[i] = value
    return found


def _by_sharding(tensors: Sequence[torch.Tensor]) -> dict[tuple[Any, tuple[int, ...]], list[int]]:
    groups: dict[tuple[Any, tuple[int, ...]], list[int]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            axes = tuple(axis for axis, placement in enumerate(tensor.placements) if placement.is_shard())
            if axes:
                groups[tensor.device_mesh, axes].append(i)
    return groups


class Together(torch.optim.Optimizer):
    """Several optimizers as one: their groups in a row, and one state that they share."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self._parts = list(parts)
        super().__init__([p for part in parts for group in part.param_groups for p in group["params"]], {})
        self.param_groups = [group for part in parts for group in part.param_groups]
        for part in parts:
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of each."""
        loss = closure() if closure is not None else None
        for part in self._parts:
            part.step()
        return loss

    @property
    def parts(self) -> Iterator[torch.optim.Optimizer]:
        """The optimizers, in the order of the groups."""
        return iter(self._parts)
