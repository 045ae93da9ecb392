"""Documents in one row kept apart where an architecture of transformers does not do so itself.

Positions that restart tell transformers where a document begins. Some architectures do not hand them to the function
that makes their causal mask: packed documents would see each other, and nothing would say so.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

_DEAF = ("bloom", "falcon", "mpt")
_positions: ContextVar[torch.Tensor | None] = ContextVar("positions", default=None)

M = TypeVar("M", bound=PreTrainedModel)


def keep_documents_apart(model: M) -> M:
    """The model, whose causal mask follows the `position_ids` it is called with, whatever its architecture.

    Bloom and MPT have no positions but ALiBi's, which are differences and hold in a packed row too.
    """
    if model.config.model_type in _DEAF:
        module: Any = sys.modules[type(model.base_model).__module__]
        if not hasattr(module.create_causal_mask, "__wrapped__"):
            module.create_causal_mask = _hearing(module.create_causal_mask)
        # Not a hook: PEFT calls `forward` itself.
        model.forward = _telling(model.forward)
    return model


def _hearing(create: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(create)
    def call(*arguments: Any, **named: Any) -> Any:
        return create(*arguments, **{"position_ids": _positions.get(), **named})

    return call


def _telling(forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def call(*arguments: Any, **named: Any) -> Any:
        token = _positions.set(named.get("position_ids"))
        try:
            return forward(*arguments, **named)
        finally:
            _positions.reset(token)

    return call
