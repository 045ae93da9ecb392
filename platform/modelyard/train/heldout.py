"""Held-out evaluation, shared between the workers."""

from __future__ import annotations

import math

import numpy as np
import torch

from modelyard.tokens import rank_slice
from modelyard.train.data import Sequences, read
from modelyard.train.objective import Objective
from modelyard.train.parallel.strategy import Strategy


@torch.no_grad()
def heldout_loss(
    strategy: Strategy, objective: Objective, data: Sequences, limit: int | None = None, batch: int = 16
) -> float:
    """Mean loss over the first `limit` sequences (None = all), the same number on every worker.

    The model is left in the mode it was in.
    """
    model, world, training = strategy.model, strategy.world, strategy.model.training
    total = len(data) if limit is None else min(limit, len(data))
    mine = rank_slice(np.arange(total, dtype=np.int64), strategy.reader, strategy.readers)
    rounds = math.ceil(math.ceil(total / strategy.readers) / batch)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    model.eval()
    for part in np.array_split(mine, rounds):
        found = strategy.evaluate(objective, read(data, part, world.device))
        sums += torch.stack([found["loss"], found["weight"]])
    model.train(training)
    loss_sum, weight = world.add(sums).tolist()
    return loss_sum / weight if weight else math.nan
