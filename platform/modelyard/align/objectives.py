"""What the loop minimises in alignment: from packed answers to log-probabilities to the losses of `losses`.

A batch holds documents in groups of two (chosen and rejected; for KTO an answer and a mismatched one):
`input_ids` int64 [B, L], `document_ids` int32 [B, L] (-1 at padding), `loss_mask` bool [B, L] (true at the answers),
and values [B, D] by document: `reference` (summed log-probability before training), `label` or `margin`. Sums are
over pairs, and `weight` is their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from modelyard.align import losses
from modelyard.align.logprobs import document_sums, token_scores
from modelyard.align.options import PreferenceOptions, RewardOptions
from modelyard.train.objective import Batch, first_tokens, next_tokens, positions

Result = tuple[torch.Tensor, dict[str, torch.Tensor]]

USES_REFERENCE = ("dpo", "ipo", "kto")
BETA = {"dpo": 0.1, "ipo": 0.1, "kto": 0.1, "orpo": 0.1, "simpo": 2.0}


@dataclass(frozen=True)
class Answers:
    """Of every document its answer's log-probability and number of tokens, fp32 [B, D]; 0 where there is none."""

    logprobs: torch.Tensor
    lengths: torch.Tensor

    @property
    def means(self) -> torch.Tensor:
        """Log-probability a token."""
        return self.logprobs / self.lengths.clamp(min=1)


def answers(model: nn.Module, batch: Batch) -> Answers:
    """One forward pass over packed documents."""
    documents = batch["document_ids"]
    labels = next_tokens(batch["input_ids"], batch["loss_mask"] & ~first_tokens(documents))
    inputs = {"input_ids": batch["input_ids"], "position_ids": positions(documents), "use_cache": False}
    found = token_scores(model, inputs, labels).logprobs
    count = _documents(batch)
    return Answers(document_sums(found, documents, count), document_sums((labels != -100).float(), documents, count))


def _documents(batch: Batch) -> int:
    """Documents of a sequence at most, an even number."""
    most = int(batch["document_ids"].max()) + 1
    return max(2, most + most % 2)


@contextmanager
def adapter_off(model: Any) -> Iterator[None]:
    """The model as it was before it got its adapter."""
    training = model.training
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        yield
    model.train(training)


class PreferenceObjective:
    """DPO, IPO, KTO, ORPO or SimPO over packed pairs.

    Further metrics, means over pairs: `accuracy` (the chosen answer has the greater reward; equal ones count half),
    `margin` of rewards, `chosen_reward`, `rejected_reward`, `chosen_logprob` and `rejected_logprob` a token, `prefers`
    (the policy gives the chosen answer more probability).
    """

    def __init__(self, method: str, options: PreferenceOptions) -> None:
        self.method, self.options = method, options
        self.beta = options.beta if options.beta is not None else BETA[method]
        self.__name__ = method

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        policy = answers(model, batch)
        reference = self._reference(model, batch, policy) if self.method in USES_REFERENCE else None
        if self.method == "kto":
            assert reference is not None
            return self._kto(policy, reference, batch)
        return self._pairs(policy, reference)

    def _reference(self, model: nn.Module, batch: Batch, policy: Answers) -> torch.Tensor:
        if "reference" in batch:
            return batch["reference"][:, : policy.logprobs.shape[1]]
        with adapter_off(model):
            return answers(model, batch).logprobs

    def _pairs(self, policy: Answers, reference: torch.Tensor | None) -> Result:
        present = policy.lengths[:, 0::2] > 0
        mean = policy.means
        chosen, rejected = (mean[:, side::2][present] for side in (0, 1))
        total = [policy.logprobs[:, side::2][present] for side in (0, 1)]
        values, rewards = self._losses(policy, reference, present)
        metrics = _rewards(*rewards) | {
            "chosen_logprob": chosen.sum(),
            "rejected_logprob": rejected.sum(),
            "prefers": (total[0] > total[1]).float().sum(),
        }
        return values.sum(), {"weight": present.sum(), **{k: v.detach() for k, v in metrics.items()}}

    def _losses(
        self, policy: Answers, reference: torch.Tensor | None, present: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        o, beta = self.options, self.beta
        if reference is None:
            chosen, rejected = (policy.means[:, side::2][present] for side in (0, 1))
            if self.method == "simpo":
                found = losses.simpo(chosen, rejected, beta, o.gamma, o.label_smoothing)
            else:
                found = losses.orpo(chosen, rejected, -chosen, beta)
            return found, (beta * chosen, beta * rejected)
        ratio = policy.logprobs - reference
        if self.method == "ipo":
            ratio = ratio / policy.lengths.clamp(min=1)
        chosen, rejected = (ratio[:, side::2][present] for side in (0, 1))
        if self.method == "ipo":
            return losses.ipo(chosen, rejected, beta), (beta * chosen, beta * rejected)
        found = losses.dpo(chosen, rejected, beta, o.label_smoothing)
        if o.sft:
            found = found - o.sft * policy.means[:, 0::2][present]
        return found, (beta * chosen, beta * rejected)

    def _kto(self, policy: Answers, reference: torch.Tensor, batch: Batch) -> Result:
        present, o = policy.lengths[:, 0::2] > 0, self.options
        ratio = policy.logprobs - reference
        own, other = (ratio[:, side::2][present] for side in (0, 1))
        liked = batch["label"][:, 0 : ratio.shape[1] : 2][present].bool()
        # Of this forward pass alone: the paper, too, takes the batch at hand.
        baseline = other.detach().mean().clamp(min=0) if len(other) else other.new_zeros(())
        found = losses.kto(own, liked, baseline, self.beta, o.desirable, o.undesirable)
        reward = self.beta * own.detach()
        right = torch.where(liked, own.detach() > baseline, own.detach() < baseline)
        return found.sum(), {
            "weight": present.sum(),
            "accuracy": right.float().sum(),
            "margin": torch.where(liked, reward, -reward).sum(),
            "kl": baseline * present.sum(),
        }


def _rewards(chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
    # Before training policy and reference agree: no pair is ranked then, and half of them would be by chance.
    return {
        "accuracy": ((chosen > rejected).float() + 0.5 * (chosen == rejected)).sum(),
        "margin": (chosen - rejected).sum(),
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
    }


class RewardObjective:
    """Bradley-Terry over packed pairs, for a model with a `score` layer of one output. Metrics as above."""

    def __init__(self, options: RewardOptions) -> None:
        self.options = options
        self.__name__ = "bradley_terry"

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        rewards, present = document_rewards(model, batch)
        both = present[:, 0::2] & present[:, 1::2]
        chosen, rejected = (rewards[:, side::2][both] for side in (0, 1))
        margin = batch["margin"][:, 0 : rewards.shape[1] : 2][both] if "margin" in batch else None
        found = losses.bradley_terry(chosen, rejected, margin, self.options.center)
        metrics = {name: value.detach() for name, value in _rewards(chosen, rejected).items()}
        return found.sum(), {"weight": both.sum(), **metrics}


class ProcessObjective:
    """Process rewards over packed answers, for the same kind of model: binary cross-entropy of the score at the last
    token of every step with the step's label (Lightman et al. 2023, arXiv 2305.20050; Wang et al. 2023, 2312.08935).

    The batch has `step_labels`, fp32 [B, L]: 0 to 1 where a step ends, -1 elsewhere. Sums are over steps. Further
    metrics, means over steps: `accuracy` (score and label on the same side of a half), `score`, `label`.
    """

    __name__ = "process_reward"

    def __call__(self, model: nn.Module, batch: Batch) -> Result:
        read = step_ends(batch)
        scores, labels = token_rewards(model, batch)[read], batch["step_labels"][read]
        found = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        right = (scores.detach() >= 0) == (labels >= 0.5)
        metrics = {"accuracy": right.float().sum(), "score": scores.detach().sigmoid().sum(), "label": labels.sum()}
        return found, {"weight": read.sum(), **metrics}


def step_ends(batch: Batch) -> torch.Tensor:
    """Where a step's score is read, bool [B, L]."""
    # A micro-batch that is all padding has its mask cleared, not its labels.
    return batch["loss_mask"] & (batch["step_labels"] >= 0)


def document_rewards(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The score at the last token of every document, fp32 [B, D], and which documents there are, bool [B, D]."""
    documents = batch["document_ids"]
    scores = token_rewards(model, batch)
    last = torch.ones_like(documents, dtype=torch.bool)
    last[:, :-1] = documents[:, :-1] != documents[:, 1:]
    last &= documents >= 0
    count = _documents(batch)
    present = document_sums(last.float(), documents, count) > 0
    return document_sums(scores * last, documents, count), present


def token_rewards(model: nn.Module, batch: Batch) -> torch.Tensor:
    """The score at every token of packed documents, fp32 [B, L].

    `model` is a transformers sequence classifier; its own pooling knows no packed documents and is passed over.
    """
    documents = batch["document_ids"]
    kept: list[torch.Tensor] = []
    hook = score_layer(model).register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    try:
        model(input_ids=batch["input_ids"], position_ids=positions(documents), use_cache=False)
    finally:
        hook.remove()
    return kept[0].squeeze(-1).float()


def score_layer(model: Any) -> nn.Module:
    """The layer that makes the reward, also under an adapter."""
    found = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] == "score"]
    layer: nn.Module = found[0]
    return layer
