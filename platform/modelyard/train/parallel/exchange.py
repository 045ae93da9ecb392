"""Differentiable exchanges between the workers of a process group: what tensor, context and expert splits are made of.

Each has a forward and the matching backward. Whether a gradient must be summed follows from what the tensor is on
every worker: the same everywhere (`whole`), a part along a dimension (`part`), or a term of a sum (`term`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

Group = dist.ProcessGroup


def enter(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Whole -> whole, where each worker goes on with its own part of the work: gradients are terms and are summed."""
    return _Enter.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def total(x: torch.Tensor, group: Group) -> torch.Tensor:
    """Term -> whole, the sum over the group."""
    return _Total.apply(x, group)  # type: ignore[no-untyped-call, no-any-return]


def gather_terms(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Part along `dim` -> whole; gradients are terms: they are summed and cut."""
    return _GatherTerms.apply(x, group, dim)  # type: ignore[no-untyped-call, no-any-return]


def scatter_total(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Term -> this worker's part along `dim` of the sum."""
    return _ScatterTotal.apply(x, group, dim)  # type: ignore[no-untyped-call, no-any-return]


def cut(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Whole -> this worker's part along `dim`."""
    return _Cut.apply(x, group, dim)  # type: ignore[no-untyped-call, no-any-return]


def join(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    """Part along `dim` -> whole, with which every worker goes on in the same way."""
    return _Join.apply(x, group, dim)  # type: ignore[no-untyped-call, no-any-return]


def trade(x: torch.Tensor, group: Group, sent: list[int], received: list[int]) -> torch.Tensor:
    """Sends `sent[i]` rows of `x` [rows, ...] to worker i and receives `received[i]` from it, in order."""
    return _Trade.apply(x, group, sent, received)  # type: ignore[no-untyped-call, no-any-return]


def swap(x: torch.Tensor, group: Group, split: int, joined: int) -> torch.Tensor:
    """Part along `joined` and whole along `split` -> the other way round (Ulysses: heads for sequence)."""
    n = dist.get_world_size(group)
    parts = torch.stack(x.chunk(n, dim=split)).contiguous()
    even = [1] * n
    return torch.cat(list(trade(parts, group, even, even).unbind(0)), dim=joined)


def _gather(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, x, group=group)
    return torch.cat(parts, dim=dim)


def _own(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    return x.chunk(dist.get_world_size(group), dim=dim)[dist.get_rank(group)].contiguous()


def _summed(x: torch.Tensor, group: Group) -> torch.Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=group)
    return x


def _reduce_scatter(x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
    parts = [part.contiguous() for part in x.chunk(dist.get_world_size(group), dim=dim)]
    mine = torch.empty_like(parts[0])
    dist.reduce_scatter(mine, parts, group=group)
    return mine


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.group), None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group) -> torch.Tensor:
        return _summed(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


class _GatherTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _reduce_scatter(grad, ctx.group, ctx.dim), None, None


class _ScatterTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _reduce_scatter(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.dim), None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _own(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _gather(grad, ctx.group, ctx.dim), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, dim: int) -> torch.Tensor:
        ctx.group, ctx.dim = group, dim
        return _gather(x, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _own(grad, ctx.group, ctx.dim), None, None


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Group, sent: list[int], received: list[int]) -> torch.Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _all_to_all(x, group, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _all_to_all(grad, ctx.group, ctx.received, ctx.sent), None, None, None


def _all_to_all(x: torch.Tensor, group: Group, sent: list[int], received: list[int]) -> torch.Tensor:
    out = x.new_empty((sum(received), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out
