"""Gradients of replicas (DDP) exchanged with fewer bytes: half precision, or low-rank factors (PowerSGD)."""

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
        else:
            # A lambda: DDP compares annotations with its own class, which has no type for checkers.
            ddp.register_comm_hook(self, lambda state, bucket: _half(state, bucket))


def _half(state: Compression, bucket: Any) -> Any:
    whole, scale = bucket.buffer(), state.scale / dist.get_world_size()
    small = (whole * scale).to(state.dtype)
    future = dist.all_reduce(small, async_op=True).get_future()
    # The scale had the division by the workers in it.
    return future.then(lambda found: whole.copy_(found.value()[0]).div_(state.scale))
