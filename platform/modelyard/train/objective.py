"""Objectives: what is minimised, as functions of a model and a batch.

An objective returns `(loss, metrics)`. `loss` is a scalar **sum** over whatever it counts (target tokens, pairs), and
`metrics["weight"]` is that count; other metrics are sums over the same count. The loop divides by the weight of the
whole global batch, so the gradient does not depend on how a batch is cut into workers and micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from modelyard.errors import RecipeError
from modelyard.train.head import IGNORE, language_loss

Batch = Mapping[str, torch.Tensor]
Objective = Callable[[nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


def causal_lm(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Next-token cross-entropy over packed sequences, in nats.

    `batch`: `input_ids` int64 [B, L]; `document_ids` int32 [B, L], -1 at padding. Documents of one sequence see each
    other, and the first token of a document is predicted from the end of the one before.
    """
    labels = next_tokens(batch["input_ids"], batch["document_ids"] >= 0)
    return language_loss(model, {"input_ids": batch["input_ids"], "use_cache": False}, labels)


def causal_lm_by_document(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same with attention and positions confined to each document; first tokens are not predicted."""
    documents = batch["document_ids"]
    labels = next_tokens(batch["input_ids"], (documents >= 0) & ~first_tokens(documents))
    inputs = {"input_ids": batch["input_ids"], "position_ids": positions(documents), "use_cache": False}
    return language_loss(model, inputs, labels)


def completion_lm(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Supervised fine-tuning: cross-entropy of completion tokens only; packed pairs do not see each other.

    `batch` as in :func:`causal_lm`, and `loss_mask` bool [B, L], true at tokens to be learnt.
    """
    documents = batch["document_ids"]
    labels = next_tokens(batch["input_ids"], batch["loss_mask"] & ~first_tokens(documents))
    inputs = {"input_ids": batch["input_ids"], "position_ids": positions(documents), "use_cache": False}
    return language_loss(model, inputs, labels, sparse=True)


def next_tokens(input_ids: torch.Tensor, learnt: torch.Tensor) -> torch.Tensor:
    """Labels aligned with logits: position i holds token i+1 where `learnt[i+1]`, else `IGNORE`; [B, L]."""
    labels = torch.full_like(input_ids, IGNORE)
    labels[:, :-1] = input_ids[:, 1:].masked_fill(~learnt[:, 1:], IGNORE)
    return labels


def first_tokens(document_ids: torch.Tensor) -> torch.Tensor:
    """True where a document (or padding) begins inside its sequence; bool [B, L]."""
    first = torch.ones_like(document_ids, dtype=torch.bool)
    first[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return first


def positions(document_ids: torch.Tensor) -> torch.Tensor:
    """Positions that restart at every document, int64 [B, L].

    transformers reads restarting positions as the sign of packing and confines attention to each run
    (`masking_utils.find_packed_sequence_indices`).
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand(document_ids.shape)
    starts = torch.where(first_tokens(document_ids), index, torch.zeros_like(index))
    return index - starts.cummax(dim=1).values


def checked(objective: Objective) -> Objective:
    """The same objective, which names its own mistake instead of failing in the middle of backward.

    Raises:
        RecipeError: at the first call, when the result is not a scalar loss and a `weight`.
    """

    def call(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        result = objective(model, batch)
        name = getattr(objective, "__name__", str(objective))
        mend = "return (loss, metrics): loss a scalar sum with a gradient, metrics['weight'] the count it sums over"
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            raise RecipeError(f"objective {name} returned {type(result).__name__}", place=name, mend=mend)
        loss, metrics = result
        if not isinstance(loss, torch.Tensor) or loss.ndim != 0:
            raise RecipeError(f"objective {name} returned a loss that is not a scalar", place=name, mend=mend)
        if "weight" not in metrics:
            raise RecipeError(f"objective {name} returned no weight", place=name, mend=mend)
        return loss, metrics

    return call
