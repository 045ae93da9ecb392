"""Differentiable exchanges between the workers of a process group: what tensor, context and expert splits are made of.

Each has a forward and the matching backward. Whether a gradient must be summed follows from what the tensor is on
every worker: the same everywhere (`whole`), a part along a dimension (`part`), or a term of a sum (`term`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup
Move = Callable[[torch.Tensor], torch.Tensor]


def enter(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Whole -> whole, where each worker goes on with its own part of the work: gradients are terms and are summed."""
    return _moved(x, _same, partial(_summed, group=group))


def total(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Term -> whole, the sum over the group."""
    return _moved(x, partial(_summed, group=group), _same)


def gather_terms(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Part along `dim` -> whole; gradients are terms: they are summed and cut."""
    return _moved(x, partial(gather, group=group, dim=dim), partial(_reduce_scatter, group=group, dim=dim))


def scatter_total(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Term -> this worker's part along `dim` of the sum."""
    return _moved(x, partial(_reduce_scatter, group=group, dim=dim), partial(gather, group=group, dim=dim))


def cut(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Whole -> this worker's part along `dim`."""
    return _moved(x, partial(own, group=group, dim=dim), partial(gather, group=group, dim=dim))


def join(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Part along `dim` -> whole, with which every worker goes on in the same way."""
    return _moved(x, partial(gather, group=group, dim=dim), partial(own, group=group, dim=dim))


def trade(x: torch.Tensor, group: Group, sent: list[int], received: list[int]) -> torch.Tensor:
    """Sends `sent[i]` rows of `x` [rows, ...] to worker i and receives `received[i]` from it, in order."""
    there = partial(_all_to_all, group=group, sent=sent, received=received)
    return _moved(x, there, partial(_all_to_all, group=group, sent=received, received=sent))


def swap(x: torch.Tensor, group: Group, split: int, joined: int) -> torch.Tensor:
    """Part along `joined` and whole along `split` -> the other way round (Ulysses: heads for sequence)."""
    n = dist.get_world_size(group)
    parts = torch.stack(x.chunk(n, dim=split)).contiguous()
    even = [1] * n
    return torch.cat(list(trade(parts, group, even, even).unbind(0)), dim=joined)


def gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Part along `dim` -> whole, without gradients."""
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=dim)


def own(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Whole -> this worker's part along `dim`, without an exchange."""
    return x.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)].contiguous()


def _same(x: torch.Tensor) -> torch.Tensor:
    return x.view_as(x)


def _summed(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _reduce_scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=dim)]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group)
    return mine


def _all_to_all(x: torch.Tensor, group: Group, sent: list[int], received: list[int]) -> torch.Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def _moved(x: torch.Tensor, there: Move, back: Move) -> torch.Tensor:
    return _Moved.apply(x, there, back)  # type: ignore[no-untyped-call, no-any-return]


class _Moved(torch.autograd.Function):
    """`there` in forward and `back`, its transpose, in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Move, back: Move) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grad), None, None
