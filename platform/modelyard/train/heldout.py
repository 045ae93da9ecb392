"""Held-out evaluation, shared between the workers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from modelyard.tokens import rank_slice
from modelyard.train.data import Sequences, read
from modelyard.train.objective import Objective
from modelyard.train.world import World


@torch.no_grad()
def heldout_loss(
    model: nn.Module, objective: Objective, data: Sequences, world: World, limit: int | None = None, batch: int = 16
) -> float:
    """Mean loss over the first `limit` sequences (None = all), the same number on every worker.

    The model is left in the mode it was in.
    """
    total = len(data) if limit is None else min(limit, len(data))
    mine = rank_slice(np.arange(total, dtype=np.int64), world.rank, world.size)
    rounds = math.ceil(math.ceil(total / world.size) / batch)
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)
    training = model.training
    model.eval()
    for part in np.array_split(mine, rounds):
        loss, metrics = objective(model, read(data, part, world.device))
        sums += torch.stack([loss.double(), metrics["weight"].double()])
    model.train(training)
    loss_sum, weight = world.add(sums).tolist()
    return loss_sum / weight if weight else math.nan
