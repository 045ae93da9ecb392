"""Documents in one row kept apart where an architecture of transformers does not do so itself.

Positions that restart tell transformers where a document begins. Some architectures do not hand them to the function
that makes their causal mask: packed documents would see each other, and nothing would say so. Others carry a state from
token to token, which no mask parts; they are refused.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from modelyard.errors import RecipeError

_DEAF = ("biogpt", "bloom", "falcon", "gpt_oss", "mpt", "opt", "xglm")
_MASKS = ("create_causal_mask", "create_sliding_window_causal_mask")
_positions: ContextVar[torch.Tensor | None] = ContextVar("positions", default=None)

M = TypeVar("M", bound=PreTrainedModel)


def keep_documents_apart(model: M) -> M:
    """The model, whose causal mask follows the `position_ids` it is called with, if its architecture is one of those
    that make it without.

    Bloom and MPT have no positions but ALiBi's, which are differences and hold in a packed row too.
    """
    if model.config.model_type in _DEAF:
        module = sys.modules[type(model.base_model).__module__]
        for name in _MASKS:
            create = getattr(module, name, None)
            if create is not None and not hasattr(create, "__wrapped__"):
                setattr(module, name, _hearing(create))
        # Not a hook: PEFT calls `forward` itself.
        model.forward = _telling(model.forward)
    return model


@torch.no_grad()
def check_documents_apart(model: PreTrainedModel) -> None:
    """Tries six tokens on a model with its weights.

    Raises:
        RecipeError: a document changes what is computed of the next one in its row.
    """
    if model.config.is_encoder_decoder:
        return
    training, ids = model.training, torch.tensor([[1, 2, 3, 4, 5, 6], [3, 1, 1, 4, 5, 6]], device=model.device)
    places = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2, device=model.device)
    model.eval()
    found = model(input_ids=ids, position_ids=places, use_cache=False, output_hidden_states=True)
    model.train(training)
    second = found.hidden_states[-1][:, 3:].float()
    if (second[0] - second[1]).abs().max() > 1e-3 * second.abs().max():
        raise RecipeError(
            f"documents that share a row see each other in models of kind {model.config.model_type}",
            place="model",
            mend="choose an architecture of attention alone; pretrain can take this one",
        )


def _hearing(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def call(*arguments: Any, **named: Any) -> Any:
        positions = _positions.get()
        if positions is not None:
            # A mask of ones that the architecture made itself would hide the positions.
            named |= {"position_ids": positions, "attention_mask": None}
        return create(*arguments, **named)

    return call


def _telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*arguments: Any, **named: Any) -> Any:
        packed = named.get("attention_mask") is None
        token = _positions.set(named.get("position_ids") if packed else None)
        try:
            return forward(*arguments, **named)
        finally:
            _positions.reset(token)

    return call
