"""The clipped policy gradient over packed answers: GRPO and its kin as one objective.

A batch holds `input_ids`, `document_ids`, `loss_mask` as everywhere, for every token [B, L] at its own position
`engine` (the log-probability it was drawn with), perhaps `old` and `reference`, and by document [B, D] `advantage`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from modelyard.align.logprobs import TokenScores, document_sums, token_scores
from modelyard.align.options import RolloutOptions
from modelyard.train.head import IGNORE
from modelyard.train.objective import Batch, first_tokens, next_tokens, positions

CLIP_HIGHER = 0.28
"""DAPO's upper clip (arXiv 2503.14476)."""


@dataclass(frozen=True)
class Clip:
    """Bounds of a probability ratio: 1 - low and 1 + high."""

    low: float
    high: float


def clipped(ratio: torch.Tensor, advantage: torch.Tensor, clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's surrogate as a loss (Schulman et al. 2017, arXiv 1707.06347, equation 7), and where the clip binds.

    `ratio` and `advantage` have one shape; higher `clip.high` is DAPO's clip-higher.
    """
    bounded = ratio.clamp(1 - clip.low, 1 + clip.high)
    binds = ((ratio < 1 - clip.low) & (advantage < 0)) | ((ratio > 1 + clip.high) & (advantage > 0))
    return -torch.min(ratio * advantage, bounded * advantage), binds


def divergence(policy: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """An unbiased estimate of KL(policy || reference) from log-probabilities of drawn tokens, never below 0
    (Schulman 2020, k3)."""
    ratio = reference - policy
    return ratio.exp() - ratio - 1


class AnswerObjective:
    """What objectives over rollouts share.

    Attributes:
        largest: the greatest difference of a token between the engine's and the trainer's log-probability since
            :meth:`reset`.
    """

    values: ClassVar[bool] = False
    """Whether the model's value head is asked."""

    def __init__(self, options: RolloutOptions) -> None:
        self.options, self.largest = options, 0.0

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss as `train.objective` wants it."""
        raise NotImplementedError

    def reset(self) -> None:
        """Begins a new step."""
        self.largest = 0.0

    def scores(self, model: nn.Module, batch: Batch) -> tuple[TokenScores, torch.Tensor]:
        """Scores of the answers' tokens, at the positions that predict them, and where those are; [B, L]."""
        documents = batch["document_ids"]
        labels = next_tokens(batch["input_ids"], batch["loss_mask"] & ~first_tokens(documents))
        inputs = {"input_ids": batch["input_ids"], "position_ids": positions(documents), "use_cache": False}
        return token_scores(model, inputs, labels, self.options.temperature, self.values), labels != IGNORE

    @property
    def compares(self) -> bool:
        """Whether engine and trainer have scored the answers with the same weights, at the same temperature."""
        return self.options.temperature == 1.0 and not self.options.staleness

    def correction(
        self, old: torch.Tensor, batch: Batch, learnt: torch.Tensor, measure: torch.Tensor
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """What answers drawn with older weights count, by token: min(cap, p / b) between the policy before this set's
        updates (`old`, p) and what drew the token, whichever weights that were (b). None without staleness.

        Decoupled PPO (Hilton et al. 2022, arXiv 2110.00641; AReaL, arXiv 2505.24298, equation 5) with truncated
        importance weights (Ionides 2008). An answer that is one action (rloo) has the product of its tokens'. All are
        [B, L] at the positions that predict; metrics `importance_weight_mean` and `importance_clipped`, the share that
        the cap binds.
        """
        if not self.options.staleness:
            return None, {}
        gap = (old - shifted(batch["engine"])) * learnt
        if self.options.variant == "rloo":
            documents = batch["document_ids"]
            count = max(1, int(documents.max()) + 1)
            gap = document_sums(gap, documents, count).gather(1, documents.clamp(min=0).long())
        cap = math.log(self.options.importance_cap)
        weight = gap.clamp(max=cap).exp().detach()
        return weight, {
            "importance_weight_mean": (weight * measure).sum(),
            "importance_clipped": ((gap > cap) * measure).sum(),
        }

    def difference(self, scores: TokenScores, batch: Batch, measure: torch.Tensor) -> dict[str, torch.Tensor]:
        """`engine_difference` with the weights the answers were drawn with, the mean by `measure` [B, L]; nothing where
        the engine's log-probabilities are of another temperature or of older weights."""
        if not self.compares:
            return {}
        drawn = shifted(batch["old"]) if "old" in batch else scores.logprobs.detach()
        gap = ((drawn - shifted(batch["engine"])) * (measure > 0)).abs()
        self.largest = max(self.largest, float(gap.max()))
        return {"engine_difference": (gap * measure).sum()}


class PolicyObjective(AnswerObjective):
    """The loss of one rollout's answers. The weight is answers, or tokens for `dapo` and `reinforce++`.

    Further metrics, means with the same weight: `entropy` (nats), `clip_fraction`, `kl` (from the reference, where
    there is one), `drift` (of log-probabilities since the answers were drawn), `engine_difference` (mean absolute
    difference of the engine's and the trainer's log-probabilities; only at temperature 1 and without staleness), and
    those of :meth:`correction`.
    """

    def __init__(self, options: RolloutOptions, largest_answer: int) -> None:
        super().__init__(options)
        self._longest = largest_answer
        high = options.clip_high
        if high is None:
            high = CLIP_HIGHER if options.variant == "dapo" else options.clip
        self.clip = Clip(options.clip, high)
        self.__name__ = options.variant

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        documents = batch["document_ids"]
        scores, learnt = self.scores(model, batch)
        count = int(documents.max()) + 1 if documents.numel() and int(documents.max()) >= 0 else 1
        lengths = document_sums(learnt.float(), documents, count)
        index = documents.clamp(min=0).long()
        advantage = batch["advantage"][:, :count].gather(1, index)
        old = shifted(batch["old"]) if "old" in batch else scores.logprobs.detach()
        share = (1 / lengths.clamp(min=1)).gather(1, index) * learnt  # sums to 1 over an answer
        change = (scores.logprobs - old) * learnt
        if self.options.variant == "rloo":
            # The answer is one action: its ratio is the product over its tokens.
            change = document_sums(change, documents, count).gather(1, index)
        loss, binds = clipped(change.exp(), advantage, self.clip)
        answers = (lengths > 0).sum()
        by_token = self.options.variant in ("dapo", "reinforce++")
        measure = learnt.float() if by_token else share
        weights = learnt / self._longest if self.options.variant == "dr_grpo" else measure
        correction, corrected = self.correction(old, batch, learnt, measure)
        weights = weights if correction is None else weights * correction
        total = (loss * weights).sum()
        metrics = {
            "weight": learnt.sum() if by_token else answers,
            "entropy": (scores.entropy * measure).sum(),
            "clip_fraction": (binds * measure).sum(),
            "drift": ((scores.logprobs.detach() - old) * measure).sum(),
        }
        if "reference" in batch:
            kl = divergence(scores.logprobs, shifted(batch["reference"])) * learnt
            metrics["kl"] = (kl.detach() * measure).sum()
            penalty = kl * change.exp() if self.options.unbiased_kl else kl
            total = total + self.options.kl * (penalty * weights).sum()
        return total, metrics | corrected | self.difference(scores, batch, measure)


def shifted(values: torch.Tensor) -> torch.Tensor:
    """Values of tokens, at the positions that predict them."""
    moved = torch.zeros_like(values)
    moved[:, :-1] = values[:, 1:]
    return moved
