"""Batches: which sequences a worker reads at a step, and reading them ahead of time.

The order is global and belongs to (seed, step); a worker takes its slice. The state of the data is therefore the
number of steps done, on any number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from modelyard.errors import ResourceError
from modelyard.tokens import global_batch_indices, rank_slice

Indices = npt.NDArray[np.int64]
MicroBatches = list[dict[str, torch.Tensor]]


class Sequences(Protocol):
    """Random access to fixed-length sequences: what `tokens.TokenDataset` and packed pairs both are."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.ArrayLike) -> Mapping[str, Any]:
        """Arrays [n, L] by name; at least `input_ids` and `document_ids` (-1 at padding)."""
        ...


def read(data: Sequences, indices: Indices, device: torch.device) -> dict[str, torch.Tensor]:
    """One micro-batch as tensors. No indices give one sequence that is all padding, so that every worker
    makes the same number of forward passes."""
    arrays = data.batch(indices if len(indices) else np.zeros(1, dtype=np.int64))
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)).to(device) for name, array in arrays.items()}
    if not len(indices):
        batch["document_ids"].fill_(-1)
        if "loss_mask" in batch:
            batch["loss_mask"].fill_(False)
    return batch


class Feed:
    """Reads the micro-batches of the next step in a thread while this one computes.

    Args:
        data: the sequences.
        seed: of the order.
        global_batch: sequences a step over all workers.
        micro_batch: most sequences of one forward pass; None = 16.
        rank: this worker.
        workers: how many share the batch.
        device: where tensors go.

    Raises:
        ResourceError: the global batch is smaller than the number of workers.
    """

    def __init__(
        self,
        data: Sequences,
        seed: int,
        global_batch: int,
        micro_batch: int | None,
        rank: int,
        workers: int,
        device: torch.device,
    ) -> None:
        if global_batch < workers:
            raise ResourceError(
                f"a global batch of {global_batch} sequences cannot feed {workers} workers",
                place="global_batch",
                mend=f"raise global_batch to at least {workers} or use fewer workers",
            )
        self._data, self._seed, self._batch, self._device = data, seed, global_batch, device
        self._rank, self._workers = rank, workers
        self._parts = math.ceil(math.ceil(global_batch / workers) / (micro_batch or 16))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[MicroBatches]] | None = None

    def load(self, step: int) -> MicroBatches:
        """The micro-batches of `step`, read now."""
        everyone = global_batch_indices(self._seed, step, self._batch, len(self._data))
        mine = rank_slice(everyone, self._rank, self._workers)
        return [read(self._data, part, self._device) for part in np.array_split(mine, self._parts)]

    def take(self, step: int, more: bool) -> tuple[MicroBatches, float]:
        """The micro-batches of `step` and the seconds they were waited for; `more` starts reading the next."""
        began = time.perf_counter()
        ahead = self._ahead
        batches = ahead[1].result() if ahead is not None and ahead[0] == step else self.load(step)
        self._ahead = (step + 1, self._pool.submit(self.load, step + 1)) if more else None
        return batches, time.perf_counter() - began

    def __enter__(self) -> Feed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
