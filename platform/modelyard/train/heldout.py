"""Held-out evaluation, shared between the workers, also by source."""

from __future__ import annotations

import math

import numpy as np
import torch

from modelyard.tokens import TokenDataset, rank_slice
from modelyard.train.data import Indices, Sequences, read
from modelyard.train.objective import Objective
from modelyard.train.parallel.strategy import Strategy


class Heldout:
    """Mean losses over held-out sequences, the same numbers on every worker. All workers call it together.

    Attributes:
        by_source: mean loss of each source, from the last evaluation of all sequences; empty with one source.
    """

    def __init__(self, strategy: Strategy, objective: Objective, data: Sequences, batch: int = 16) -> None:
        self._strategy, self._objective, self._data, self._batch = strategy, objective, data, batch
        self.by_source: dict[str, float] = {}

    def __call__(self, limit: int | None = None) -> float:
        """Mean loss over the first `limit` sequences, of several sources spread evenly over all (None = all).

        The model is left in the mode it was in.
        """
        sources, total = self._sources(), len(self._data)
        if limit is not None and limit < total:
            first = np.arange(limit, dtype=np.int64)
            loss, weight = self._sums(first * total // limit if len(sources) > 1 else first)
            return loss / weight if weight else math.nan
        parts = {name: self._sums(indices) for name, indices in sources.items()}
        if len(parts) > 1:
            self.by_source = {name: loss / weight if weight else math.nan for name, (loss, weight) in parts.items()}
        loss, weight = (sum(values) for values in zip(*parts.values(), strict=True))
        return loss / weight if weight else math.nan

    def _sources(self) -> dict[str, Indices]:
        """Indices by source; data that knows no sources is one."""
        if not isinstance(self._data, TokenDataset):
            return {"": np.arange(len(self._data), dtype=np.int64)}
        ranges = {source.name: self._data.source_range(source.name) for source in self._data.sources}
        return {name: np.arange(r.start, r.stop, dtype=np.int64) for name, r in ranges.items() if len(r)}

    @torch.no_grad()
    def _sums(self, indices: Indices) -> tuple[float, float]:
        """Sums of loss and weight over sequences, of all workers."""
        strategy, model = self._strategy, self._strategy.model
        world, training = strategy.world, model.training
        mine = rank_slice(indices, strategy.reader, strategy.readers)
        rounds = math.ceil(math.ceil(len(indices) / strategy.readers) / self._batch)
        sums = torch.zeros(2, dtype=torch.float64, device=world.device)
        model.eval()
        for part in np.array_split(mine, rounds):
            found = strategy.evaluate(self._objective, read(self._data, part, world.device))
            sums += torch.stack([found["loss"], found["weight"]])
        model.train(training)
        loss, weight = world.add(sums).tolist()
        return loss, weight


def heldout_loss(
    strategy: Strategy, objective: Objective, data: Sequences, limit: int | None = None, batch: int = 16
) -> float:
    """One evaluation as :class:`Heldout` makes it."""
    return Heldout(strategy, objective, data, batch)(limit)
