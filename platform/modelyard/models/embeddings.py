"""More rows for an extended vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def extend_embeddings(model: PreTrainedModel, vocab_size: int, first: int | None = None) -> int:
    """Gives input and output embeddings at least `vocab_size` rows; returns how many are new.

    A new row is the mean of the old ones, so that at first a new token is as likely as tokens are on average,
    and the logits of the old ones hardly move (Hewitt 2021, "Initializing New Word Embeddings for Pretrained
    Language Models"). The same everywhere: no random draw. Rows are never taken away: an embedding that was
    padded to a multiple stays as it is. Call it on a whole model, before it is sharded or an adapter is added.

    Args:
        model: a causal language model with weights.
        vocab_size: largest token id + 1, as `tokens.tokenizer.Encoder.vocab_size`.
        first: id of the first new token, where the embedding may have been padded beyond it; None = its rows so far.
    """
    inputs: Any = model.get_input_embeddings()
    before: int = inputs.weight.shape[0]
    first = before if first is None else min(first, before)
    if vocab_size <= first:
        return 0
    if vocab_size > before:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    parts: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    for part in parts:
        for tensor in () if part is None else (part.weight, getattr(part, "bias", None)):
            if tensor is not None and tensor.shape[0] >= vocab_size:
                tensor[first:vocab_size] = tensor[:first].float().mean(dim=0).to(tensor.dtype)
    return vocab_size - first
