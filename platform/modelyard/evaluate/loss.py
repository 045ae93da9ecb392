"""Held-out loss, perplexity and bits per byte, with their spread and their course along the sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from modelyard.train.data import Sequences, read
from modelyard.train.objective import first_tokens, next_tokens, positions


@dataclass(frozen=True)
class Loss:
    """Mean cross-entropy over predicted tokens.

    Attributes:
        nats: the mean, nats a token.
        error: standard error of the mean, from the spread between sequences; 0 for a single one.
        tokens: tokens predicted.
        sequences: sequences read.
        by_position: mean at each position of the sequence, [L - 1]; nan where nothing was predicted.
    """

    nats: float
    error: float
    tokens: int
    sequences: int
    by_position: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """exp of the loss."""
        return math.exp(min(self.nats, 700.0))

    def bits_per_byte(self, tokens: int, text_bytes: int) -> float:
        """The loss per UTF-8 byte of text, comparable across vocabularies.

        total nats / ln 2 / bytes, where the total is the mean loss times all `tokens` of the text: the
        first token of a sequence, which nothing predicts, and sequences left out by a cap count at the
        mean. The end token of each document is among the tokens and has no byte.

        Args:
            tokens: tokens of the whole held-out text.
            text_bytes: UTF-8 bytes they stand for.
        """
        return self.nats * tokens / math.log(2) / text_bytes


@torch.no_grad()
def heldout(
    model: nn.Module,
    data: Sequences,
    limit: int | None,
    *,
    document_mask: bool = False,
    batch: int = 8,
    done: Callable[[int], object] = lambda n: None,
) -> Loss:
    """Evaluates a causal model on the first `limit` sequences (None = all). Deterministic.

    Args:
        model: returns an object with `logits` [B, L, V]; left in evaluation mode.
        data: the sequences; padding is not predicted.
        limit: sequences to read at most.
        document_mask: keep documents of one sequence apart, as in training with `document_mask`.
        batch: sequences in a forward pass.
        done: told the number of sequences of each forward pass.
    """
    model.eval()
    device = next(model.parameters()).device
    total = len(data) if limit is None else min(limit, len(data))
    sums, weights = [], []
    for part in np.array_split(np.arange(total, dtype=np.int64), math.ceil(total / batch)):
        nats, real = _losses(model, read(data, part, device), document_mask)
        sums.append(nats.double().cpu().numpy())
        weights.append(real.cpu().numpy())
        done(len(part))
    return summarise(np.concatenate(sums), np.concatenate(weights))


def _losses(model: nn.Module, batch: dict[str, torch.Tensor], document_mask: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each predicted token and which there are, both [B, L - 1]."""
    documents = batch["document_ids"]
    learnt = documents >= 0
    extra = {}
    if document_mask:
        learnt &= ~first_tokens(documents)
        extra["position_ids"] = positions(documents)
    labels = next_tokens(batch["input_ids"], learnt)[:, :-1]
    logits = model(input_ids=batch["input_ids"], use_cache=False, **extra).logits[:, :-1].float()
    nats = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return nats, labels >= 0


def summarise(nats: np.typing.NDArray[np.float64], real: np.typing.NDArray[np.bool_]) -> Loss:
    """Means of losses [n, L - 1] (0 where not `real`): over all, and at each position."""
    count = int(real.sum())
    if not count:
        return Loss(math.nan, math.nan, 0, len(real), ())
    mean = float(nats.sum() / count)
    # The ratio estimator's variance: sequences are the independent units, tokens within one are not.
    residual = nats.sum(axis=1) - mean * real.sum(axis=1)
    n = len(real)
    error = float(np.sqrt((residual**2).sum() * n / max(n - 1, 1)) / count) if n > 1 else 0.0
    held = real.sum(axis=0)
    course = np.where(held > 0, nats.sum(axis=0) / np.maximum(held, 1), math.nan)
    return Loss(mean, error, count, n, tuple(course.tolist()))
