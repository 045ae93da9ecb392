"""Batches: which sequences a worker reads at a step, and reading them ahead of time.

The order is global and belongs to (seed, step); a worker takes its slice. The state of the data is therefore the
number of steps done, on any number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from modelyard.errors import DataError, ResourceError
from modelyard.tokens import MixtureOrder, TokenDataset, rank_slice, stream_indices
from modelyard.train.options import TrainOptions

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


def passes(batch: int, workers: int, micro: int) -> int:
    """Forward passes of each worker for a batch of all: as many as the largest share needs."""
    return math.ceil(math.ceil(batch / workers) / micro)


class Batches(AbstractContextManager["Batches"], Protocol):
    """Hands out the micro-batches of one step after the other: a `Feed`, a `StreamFeed`, or rollouts of a policy."""

    def take(self, step: int, more: bool) -> tuple[MicroBatches, float]:
        """The micro-batches of `step` and the seconds they were waited for; `more`: another step follows."""
        ...


Order = Callable[[int], Indices]
"""From a step (0-based) to the global indices its batch holds, over all workers; a pure function."""


def make_order(data: Sequences, options: TrainOptions) -> Order:
    """The order `options` ask for: each sequence once an epoch, or drawn from the sources by a mixture.

    Raises:
        DataError: a mixture names a source the data does not have.
    """
    plan, seed = options.batches, options.seed
    if options.mixture is None:
        return lambda step: stream_indices(seed, plan.before(step), plan.size(step), len(data))
    if not isinstance(data, TokenDataset):
        raise DataError("a mixture needs token shards with sources", place="mixture")
    sources = {source.name: data.source_range(source.name) for source in data.sources}
    return MixtureOrder(sources, options.mixture.milestones(), seed, plan.size).indices


class Feed:
    """Reads the micro-batches of the next step in a thread while this one computes.

    Args:
        data: the sequences.
        order: which of them a step reads.
        micro_batch: most sequences of one forward pass; None = 16.
        rank: this worker.
        workers: how many share the batch.
        device: where tensors go.

    Raises:
        ResourceError: the first batch is smaller than the number of workers.
    """

    def __init__(
        self, data: Sequences, order: Order, micro_batch: int | None, rank: int, workers: int, device: torch.device
    ) -> None:
        batch = len(order(0))
        if batch < workers:
            raise ResourceError(
                f"a global batch of {batch} sequences cannot feed {workers} workers",
                place="global_batch",
                mend=f"raise global_batch to at least {workers} or use fewer workers",
            )
        self._data, self._order, self._micro, self._device = data, order, micro_batch or 16, device
        self._rank, self._workers = rank, workers
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[MicroBatches]] | None = None

    def load(self, step: int) -> MicroBatches:
        """The micro-batches of `step`, read now. Every worker makes the same number of them."""
        everyone = self._order(step)
        mine = rank_slice(everyone, self._rank, self._workers)
        parts = passes(len(everyone), self._workers, self._micro)
        return [read(self._data, part, self._device) for part in np.array_split(mine, parts)]

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


class StreamFeed:
    """The micro-batches of a `Feed`, from this worker's sequences in their order, such as Ray Data hands out.

    Args:
        rows: from a step on, `input_ids` and `document_ids` [n, L] by name, any n, cut anywhere.
        size: sequences of a step (0-based), over all workers.
        micro_batch: most sequences of one forward pass; None = 16.
        rank: this worker.
        workers: how many share the batch.
        device: where tensors go.
    """

    def __init__(
        self,
        rows: Callable[[int], Iterator[Mapping[str, torch.Tensor]]],
        size: Callable[[int], int],
        micro_batch: int | None,
        rank: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self._open, self._size, self._micro, self._device = rows, size, micro_batch or 16, device
        self._rank, self._workers = rank, workers
        self._rows: Iterator[Mapping[str, torch.Tensor]] = iter(())
        self._held: dict[str, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="feed")
        self._ahead: tuple[int, Future[MicroBatches]] | None = None

    def take(self, step: int, more: bool) -> tuple[MicroBatches, float]:
        """The micro-batches of `step` and the seconds they were waited for; `more` starts reading the next.

        A step that does not follow the last one (the first, or one gone back to) opens the stream anew.

        Raises:
            DataError: the stream has ended.
        """
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            if self._ahead is not None:
                self._ahead[1].result()
            self._rows, self._held = self._open(step), {}
            self._ahead = step, self._pool.submit(self._load, step)
        batches = self._ahead[1].result()
        self._ahead = (step + 1, self._pool.submit(self._load, step + 1)) if more else None
        return batches, time.perf_counter() - began

    def _load(self, step: int) -> MicroBatches:
        batch = self._size(step)
        mine = batch * (self._rank + 1) // self._workers - batch * self._rank // self._workers
        while not self._held or len(self._held["input_ids"]) < mine:
            self._hold(step)
        whole = {name: value[:mine].to(self._device) for name, value in self._held.items()}
        self._held = {name: value[mine:] for name, value in self._held.items()}
        parts = passes(batch, self._workers, self._micro)
        cuts = {name: torch.tensor_split(value, parts) for name, value in whole.items()}
        return [_filled(dict(zip(cuts, part, strict=True))) for part in zip(*cuts.values(), strict=True)]

    def _hold(self, step: int) -> None:
        more = next(self._rows, None)
        if more is None:
            raise DataError(f"the stream of batches ended before step {step + 1}", place="stream")
        self._held = {name: torch.cat([self._held[name], more[name]]) for name in more} if self._held else dict(more)

    def __enter__(self) -> StreamFeed:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _filled(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A micro-batch, or one sequence of padding where it is empty, as :func:`read` makes it."""
    if len(batch["input_ids"]):
        return batch
    length = batch["input_ids"].shape[1]
    padding = {"input_ids": 0, "document_ids": -1}
    return {name: value.new_full((1, length), padding[name]) for name, value in batch.items()}
