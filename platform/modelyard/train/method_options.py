"""Options of the training method that have several fields: averages, batch warm-up, mixtures, what is kept. Light."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from modelyard.recipe.schema import Options


class EmaOptions(Options):
    """An exponential moving average of the weights, in checkpoints beside them."""

    decay: float = Field(
        0.999, gt=0, lt=1, description="share of the average kept at an update; less during the first 10 / (1 - decay)"
    )
    export: bool = Field(True, description="whether the model written at the end holds the averages")


class BatchWarmupOptions(Options):
    """A batch that rises from `sequences` to `global_batch` over `steps` (GPT-3, Llama 3)."""

    sequences: int = Field(ge=1, description="sequences of the first step")
    steps: int = Field(ge=1, description="steps until the batch is `global_batch`")


class MixtureStep(Options):
    """Weights of sources from a step on."""

    step: int = Field(ge=0, description="optimizer step (0-based) at which these weights hold")
    weights: dict[str, float] = Field(description="share of every source by name; they need not sum to 1")


class MixtureOptions(Options):
    """How often each source of the tokens is drawn; without it every sequence comes once an epoch."""

    weights: dict[str, float] | None = Field(None, description="share of every source by name, the same at every step")
    schedule: tuple[MixtureStep, ...] = Field(
        (), description="weights by step instead; between two entries they move along a line"
    )

    @model_validator(mode="after")
    def _one_way(self) -> MixtureOptions:
        if (self.weights is None) == (not self.schedule):
            raise ValueError("give either weights or schedule")
        return self

    def milestones(self) -> list[tuple[int, dict[str, float]]]:
        """(step, weights), as `tokens.MixtureOrder` takes them."""
        if self.weights is not None:
            return [(0, dict(self.weights))]
        return [(entry.step, dict(entry.weights)) for entry in self.schedule]


class RoutingOptions(Options):
    """What keeps the experts of a mixture in even use."""

    balance: float = Field(
        0.01, ge=0, description="weight of the load-balancing loss, summed over layers (Switch Transformer: 0.01)"
    )
    z: float = Field(0.001, ge=0, description="weight of the router z-loss, summed over layers (ST-MoE: 0.001)")
    capacity: float | None = Field(
        None,
        gt=0,
        description="choices of a sequence an expert takes, over an even share (Switch Transformer: 1.25); later "
        "tokens pass it by. Training only; null = dropless",
    )

    def room(self, tokens: int, chosen: int, experts: int) -> int:
        """Choices of one sequence of `tokens` an expert takes, of `chosen` a token."""
        return math.ceil((self.capacity or experts) * tokens * chosen / experts)


class CompressOptions(Options):
    """Gradients of replicas (`parallel.data`, without shards) exchanged with fewer bytes."""

    kind: Literal["bf16", "fp16", "powersgd", "sign"] = Field(
        description="bf16, fp16: half the bytes; powersgd: low-rank factors of every matrix (arXiv 1905.13727); "
        "sign: one bit a value with error feedback (arXiv 1901.09847), an experiment"
    )
    rank: int = Field(4, ge=1, description="rank of PowerSGD's factors (paper: 1 to 4)")
    after: int = Field(
        10,
        ge=2,
        description="steps before powersgd or sign begins; after a restart they count anew, so resuming is not exact",
    )


class DenoisingOptions(Options):
    """Span corruption (T5, arXiv 1910.10683) as a mixture of denoisers (UL2, arXiv 2205.05131)."""

    rate: float = Field(0.15, gt=0, lt=0.9, description="share of tokens hidden by the ordinary denoisers (T5: 0.15)")
    span: float = Field(3.0, ge=1, description="mean length of a hidden span in tokens (T5: 3)")
    extreme: float = Field(
        0.0, ge=0, le=1, description="share of sequences with half of the tokens hidden, in spans of 32 (UL2's X: 0.25)"
    )
    prefix: float = Field(
        0.0, ge=0, le=1, description="share of sequences whose end is hidden as one span (UL2's S: 0.5)"
    )

    @model_validator(mode="after")
    def _shares(self) -> DenoisingOptions:
        if self.extreme + self.prefix > 1:
            raise ValueError("extreme + prefix may not exceed 1: the rest are ordinary denoisers")
        return self
