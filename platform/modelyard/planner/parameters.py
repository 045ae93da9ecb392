"""Exact parameter counts from a config, by part, without building the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.planner.architecture import Architecture, parse


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by part; all counts are of distinct tensors (a tied head counts once, as embedding).

    `active` is what one token passes through: every part but the experts it is not routed to. `ffn`
    holds all experts. `exact` is false for a `model_type` that the table of families does not know.
    """

    total: int
    active: int
    embedding: int
    positions: int
    attention: int
    ffn: int
    router: int
    norm: int
    other: int
    head: int
    exact: bool = True

    @property
    def non_embedding(self) -> int:
        """Parameters without the token and position tables (Kaplan's N)."""
        return self.total - self.embedding - self.positions

    def rows(self) -> list[tuple[str, int]]:
        """Parts as (name, parameters), largest first, those that are zero left out."""
        names = ("embedding", "positions", "attention", "ffn", "router", "norm", "other", "head")
        parts = [(name, int(getattr(self, name))) for name in names]
        return sorted((part for part in parts if part[1]), key=lambda part: -part[1])


def count(config: Mapping[str, Any] | Architecture) -> Parameters:
    """Counts the parameters of the model a config describes.

    Args:
        config: a Hugging Face config as a mapping (`config.json` or `config.to_dict()`), or its
            `Architecture`. Of a language model the head is counted; of a ViT the classifier, when the
            config names labels; of BERT the masked-language-model head.

    Raises:
        RecipeError: the config lacks a needed key or holds an impossible value.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    attention = sum(x.count * (x.attention + x.cross) for x in a.stack())
    ffn = sum(x.count * x.ffn for x in a.stack())
    idle = sum(x.count * (x.ffn - x.ffn_active) for x in a.stack())
    router = sum(x.count * x.router for x in a.stack())
    norm = sum(x.count * x.norm for x in a.stack())
    total = a.embedding + a.positions + attention + ffn + router + norm + a.other + a.head
    return Parameters(
        total=total, active=total - idle, embedding=a.embedding, positions=a.positions, attention=attention,
        ffn=ffn, router=router, norm=norm, other=a.other, head=a.head, exact=a.exact,
    )  # fmt: skip
