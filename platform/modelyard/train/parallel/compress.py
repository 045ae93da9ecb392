"""Gradients of replicas (DDP) exchanged with fewer bytes: half precision, low-rank factors (PowerSGD), or signs."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from modelyard.train.method_options import CompressOptions

_SCALE = 0.25
"""What a gradient summed over one sequence is multiplied by in fp16. Gradients are sums over a batch, which fp16 cannot
hold; divided by the sequences and by 4 they are some 250 times the mean over tokens at 1,000 tokens: far from fp16's
smallest number (6e-8) and, as norms of means are about 1, from its largest."""


class Compression:
    """The communication hook of one run, whose global batch holds `sequences`."""

    def __init__(self, options: CompressOptions, sequences: int) -> None:
        self._options = options
        half = options.kind == "fp16"
        self.dtype, self.scale = (torch.float16, _SCALE / sequences) if half else (torch.bfloat16, 1.0)

    def register(self, ddp: DistributedDataParallel) -> None:
        """Makes `ddp` exchange its gradients compressed; they come out averaged, as without."""
        if self._options.kind == "powersgd":
            # Vogels et al. 2019, arXiv 1905.13727. What a step leaves out is added to the next (error feedback).
            state = PowerSGDState(
                None, matrix_approximation_rank=self._options.rank, start_powerSGD_iter=self._options.after
            )
            ddp.register_comm_hook(state, powerSGD_hook)
        elif self._options.kind == "sign":
            ddp.register_comm_hook(_Signs(self._options.after), lambda state, bucket: state.exchange(bucket))
        else:
            # A lambda: DDP compares annotations with its own class, which has no type for checkers.
            ddp.register_comm_hook(self, lambda state, bucket: _half(state, bucket))


def _half(state: Compression, bucket: Any) -> Any:
    whole, scale = bucket.buffer(), state.scale / dist.get_world_size()
    small = (whole * scale).to(state.dtype)
    future = dist.all_reduce(small, async_op=True).get_future()
    # The scale had the division by the workers in it.
    return future.then(lambda found: whole.copy_(found.value()[0]).div_(state.scale))


class _Signs:
    """One bit a value: its sign, times the mean magnitude of its tensor's values; what that leaves out is added to the
    next step's (Seide et al. 2014; EF-SGD, Karimireddy et al. 2019, arXiv 1901.09847, algorithm 1).

    Every worker sends its bits to all, so bytes grow with the workers: 1/32 of the gradients for each, against 2 for an
    all-reduce of them. The first `after` steps exchange everything: DDP arranges its buckets anew meanwhile.
    """

    def __init__(self, after: int) -> None:
        self._after = after
        self._left: dict[int, torch.Tensor] = {}
        self._steps = 0

    def exchange(self, bucket: Any) -> Any:
        whole, workers = bucket.buffer(), dist.get_world_size()
        begun = self._steps >= self._after
        self._steps += bucket.is_last()
        if not begun:
            future = dist.all_reduce(whole, async_op=True).get_future()
            return future.then(lambda found: found.value()[0].div_(workers))
        sizes = [part.numel() for part in bucket.gradients()]
        if bucket.index() in self._left:
            whole.add_(self._left[bucket.index()])
        scales = torch.stack([part.abs().mean() for part in whole.split(sizes)])
        positive = whole >= 0
        self._left[bucket.index()] = whole - _signed(positive, scales, sizes)
        sent = torch.cat([scales.view(torch.uint8), _bits(positive)])
        heard = sent.new_empty(workers, len(sent))
        future = dist.all_gather(list(heard.unbind()), sent, async_op=True).get_future()

        def mean(_: Any) -> torch.Tensor:
            whole.zero_()
            for row in heard:
                theirs, bits = row[: 4 * len(sizes)].clone().view(torch.float32), row[4 * len(sizes) :]
                whole.add_(_signed(_flags(bits, len(whole)), theirs, sizes))
            averaged: torch.Tensor = whole.div_(workers)
            return averaged

        return future.then(mean)


def _signed(positive: torch.Tensor, scales: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Plus or minus the scale of its tensor for every value."""
    spread = scales.repeat_interleave(torch.tensor(sizes, device=scales.device), output_size=len(positive))
    return torch.where(positive, spread, -spread)


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """bool [n] -> uint8 [n / 8, rounded up]."""
    padded = torch.nn.functional.pad(flags.to(torch.uint8), (0, -len(flags) % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=flags.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _flags(bits: torch.Tensor, count: int) -> torch.Tensor:
    """The inverse of :func:`_bits`."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unsqueeze(1) >> places & 1).bool().reshape(-1)[:count]
