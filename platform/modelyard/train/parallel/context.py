"""Context parallelism by Ulysses (arXiv 2309.14509): one sequence is split over workers, attention swaps it for heads.

Every worker holds a piece of each sequence everywhere but inside attention. There it sends away all heads but its
share and receives the rest of the sequence for those: attention itself is the usual one over whole sequences, so
document masks, sliding windows and grouped heads stay exact. Positions, masks and labels are made for whole sequences
and cut here, so that a label at the end of a piece is the first token of the next.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import find_packed_sequence_indices

from modelyard.errors import RecipeError
from modelyard.train.head import language_loss
from modelyard.train.parallel import exchange

NAME = "modelyard_ulysses"


class Pieces:
    """Cuts what is made for whole sequences [B, L] to this worker's piece [B, L / n]."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._n, self._rank = dist.get_world_size(group), dist.get_rank(group)

    def own(self, x: torch.Tensor) -> torch.Tensor:
        """This worker's piece of `x` along dimension 1."""
        return x.chunk(self._n, dim=1)[self._rank].contiguous()

    def inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments of a model for its piece; the mask of packed documents [B, 1, L, L] stays whole.

        Raises:
            RecipeError: the sequence does not divide, or the objective passes what cannot be cut.
        """
        ids, found = inputs["input_ids"], dict(inputs)
        length = ids.shape[1]
        if length % self._n:
            raise RecipeError(
                f"sequences of {length:,} tokens cannot be divided by context {self._n}",
                place="parallel.context",
                mend="choose a context that divides the sequence length",
            )
        mask = found.get("attention_mask")
        if mask is not None and mask.ndim != 4:
            raise RecipeError(
                "a padding mask cannot be split over context workers",
                place="parallel.context",
                mend="pass position_ids that restart at documents, or a mask [B, 1, L, L]",
            )
        positions = found.get("position_ids")
        if positions is None:
            positions = torch.arange(length, device=ids.device).expand(ids.shape)
        elif mask is None:
            found["attention_mask"] = document_mask(positions)
        return found | {"input_ids": self.own(ids), "position_ids": self.own(positions)}


def document_mask(positions: torch.Tensor) -> torch.Tensor | None:
    """Causal attention within runs of consecutive positions, bool [B, 1, L, L]; None where no sequence is packed."""
    documents = find_packed_sequence_indices(positions)
    if documents is None:
        return None
    same = documents[:, None, :, None] == documents[:, None, None, :]
    return same & _causal(positions.shape[1], None, positions.device)


def _causal(length: int, window: int | None, device: torch.device) -> torch.Tensor:
    index = torch.arange(length, device=device)
    back = index[:, None] - index[None, :]
    return (back >= 0) if window is None else (back >= 0) & (back < window)


class ContextView:
    """The model as an objective sees it: called with whole sequences, it runs this worker's piece."""

    def __init__(self, model: nn.Module, pieces: Pieces) -> None:
        self._model, self._pieces = model, pieces

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **inputs: Any) -> Any:
        """Logits of this worker's piece only; `language_loss` is what objectives should use."""
        return self._model(**self._pieces.inputs(inputs))

    def language_loss(
        self, inputs: Mapping[str, Any], labels: torch.Tensor, *, sparse: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Summed cross-entropy of this worker's piece; labels [B, L] are those of the whole sequence."""
        return language_loss(self._model, self._pieces.inputs(inputs), self._pieces.own(labels), sparse=sparse)


def split_context(model: PreTrainedModel, group: dist.ProcessGroup) -> None:
    """Makes every attention layer of `model` swap its piece of the sequence for heads, in place."""
    _register()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = NAME
        if hasattr(module, "is_causal"):
            module.context_group = group  # type: ignore[assignment]


@cache
def _register() -> None:
    AttentionInterface.register(NAME, ulysses)


def ulysses(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a piece of the sequence, query [B, heads, L/n, D], as transformers' attention interface.

    Returns [B, L/n, heads, D].

    Raises:
        RecipeError: the architecture adds to the scores what this attention does not know.
    """
    if kwargs.get("softcap") is not None or kwargs.get("position_bias") is not None or kwargs.get("s_aux") is not None:
        raise RecipeError(
            "attention with soft caps, sinks or position biases is not split over context workers",
            place="parallel.context",
            mend="use context: 1 for this architecture",
        )
    group: dist.ProcessGroup = module.context_group  # type: ignore[assignment]
    n = dist.get_world_size(group)
    if key.shape[1] % n:
        # Fewer key-value heads than workers: each query head brings its own copy.
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    query, key, value = (exchange.swap(x, group, 1, 2) for x in (query, key, value))
    length = query.shape[2]
    if sliding_window is not None and length > sliding_window:
        window = _causal(length, sliding_window, query.device)
        attention_mask = window if attention_mask is None else attention_mask & window
    if key.shape[1] != query.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attention_mask, dropout, is_causal=attention_mask is None, scale=scaling
    )
    return exchange.swap(out, group, 2, 1).transpose(1, 2).contiguous(), None
