"""Who takes part: this process's rank, how many there are, and the device it computes on."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class World:
    """One training process among `size`; `group` is what it talks over, None = the default process group."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which talks and writes."""
        return self.rank == 0

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.group)

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in order, on every rank. Small picklable values only."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def add(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def apart(self) -> World:
        """The same workers over a gloo group of their own, for a thread beside training. All call it together."""
        if self.size == 1:
            return self
        return World(self.rank, self.size, torch.device("cpu"), dist.new_group(backend="gloo"))


def current() -> World:
    """This process's place in the process group that is running, or alone when there is none."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if not torch.cuda.is_available():
        return World(rank, size, torch.device("cpu"))
    index = int(os.environ.get("LOCAL_RANK", rank % torch.cuda.device_count()))
    torch.cuda.set_device(index)
    return World(rank, size, torch.device("cuda", index))


@contextmanager
def joined(timeout_s: float = 1800.0) -> Iterator[World]:
    """Joins the process group that `torchrun` describes in the environment, and leaves it at the end.

    Without `RANK` in the environment the process works alone.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        yield current()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))
    try:
        yield current()
    finally:
        dist.destroy_process_group()
