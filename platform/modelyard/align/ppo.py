"""Proximal policy optimization: a value function on the policy's body, advantages by GAE, a steered KL penalty.

What is taken from a set of answers before the first update (`Ppo.estimate`): the reward of every token, which is the
KL penalty, and at an answer's last token its reward; advantages and returns. Arrays [B, L] hold a token's figure at its
own position: `value` is that of the state the token was drawn in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from modelyard.align.options import PpoOptions, RolloutOptions
from modelyard.align.policy import AnswerObjective, Clip, clipped, divergence, shifted
from modelyard.train.data import MicroBatches
from modelyard.train.objective import Batch, first_tokens
from modelyard.train.world import World

Floats = npt.NDArray[np.float64]
Marks = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]


class ValueHead(nn.Module):
    """The value of a state from the last hidden state [..., width], fp32 [...]; 0 at first, so that the first returns
    are the rewards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # One vector, the last entry a constant: it shards evenly and no optimizer takes it for a matrix.
        self.weight = nn.Parameter(torch.zeros(width + 1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Values."""
        weight = self.weight.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return hidden.float() @ weight[:-1] + weight[-1]


def gae(rewards: Floats, values: Floats, learnt: Marks, documents: Numbers, options: PpoOptions) -> Floats:
    """Generalized advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16) over packed answers.

    All arrays are [B, L] at the tokens' own positions; `learnt` marks answers, `documents` tells them apart. Behind an
    answer's last token the value is 0. 0 where nothing is learnt; what an answer was told in between is passed over.
    """
    found = np.zeros_like(rewards)
    later, value = np.zeros(len(rewards)), np.zeros(len(rewards))
    for at in reversed(range(rewards.shape[1])):
        if at + 1 < rewards.shape[1]:
            same = documents[:, at + 1] == documents[:, at]
            later, value = np.where(same, later, 0.0), np.where(same, value, 0.0)
        error = rewards[:, at] + options.gamma * value - values[:, at]
        own = learnt[:, at]
        found[:, at] = np.where(own, error + options.gamma * options.gae_lambda * later, 0.0)
        later, value = np.where(own, found[:, at], later), np.where(own, values[:, at], value)
    return found


def last_tokens(learnt: Marks, documents: Numbers) -> Marks:
    """The last token that every answer wrote, [B, L]."""
    last, open_ = np.zeros_like(learnt), np.ones(len(learnt), dtype=bool)
    for at in reversed(range(learnt.shape[1])):
        if at + 1 < learnt.shape[1]:
            open_ |= documents[:, at + 1] != documents[:, at]
        last[:, at] = learnt[:, at] & open_
        open_ &= ~learnt[:, at]
    return last


class KlController:
    """Steers the weight of the KL penalty to a divergence (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    Attributes:
        state: the weight, a float64 scalar; what checkpoints hold.
    """

    def __init__(self, weight: float, target: float | None, horizon: int) -> None:
        self.state = torch.tensor(weight, dtype=torch.float64)
        self._target, self._horizon = target, horizon

    @property
    def weight(self) -> float:
        """As it is now."""
        return float(self.state)

    def update(self, divergence: float, answers: int) -> None:
        """After a set of `answers` with a mean divergence in nats an answer."""
        if self._target is not None:
            error = min(0.2, max(-0.2, divergence / self._target - 1))
            # A set of more answers than the horizon moves it once: the weight stays above 0.
            self.state.mul_(1 + error * min(1.0, answers / self._horizon))


@dataclass
class _Estimate:
    """One micro-batch's arrays [B, L] in float64."""

    learnt: Marks
    values: Floats
    advantages: Floats


class Ppo:
    """What PPO makes of a set of answers before the first update.

    Args:
        options: its constants.
        kl: the KL penalty's first weight; 0 = none.
    """

    def __init__(self, options: PpoOptions, kl: float) -> None:
        self._options, self.controller = options, KlController(kl, options.kl_target, options.kl_horizon)

    def estimate(self, batches: MicroBatches, world: World) -> dict[str, float]:
        """Puts `gain` (advantages) and `returns` [B, L] into the batches of this worker; figures over all workers.

        The batches hold `old` and `value` [B, L], `advantage` [B, D] as the answers' rewards, and `reference` [B, L]
        where there is a KL penalty. Figures: `explained_variance` (1 - variance of return - value over that of the
        return), `kl_answer` (nats) and `kl_weight`, the weight these answers were charged with.
        """
        weight, divergence, answers = self.controller.weight, 0.0, 0
        estimates = []
        for batch in batches:
            estimate, nats = self._one(batch, weight)
            estimates.append(estimate)
            divergence += nats
            answers += int(last_tokens(estimate.learnt, _array(batch["document_ids"])).sum())
        parts = np.sum(world.gather([divergence, float(answers)]), axis=0)
        figures = {"kl_answer": float(parts[0] / max(1.0, parts[1])), "kl_weight": weight}
        figures["explained_variance"] = _explained(estimates, world)
        self._store(batches, estimates, world)
        self.controller.update(figures["kl_answer"], int(parts[1]))
        return figures

    def _one(self, batch: Batch, weight: float) -> tuple[_Estimate, float]:
        documents = _array(batch["document_ids"])
        learnt: Marks = _array(batch["loss_mask"] & ~first_tokens(batch["document_ids"]))
        old, values, reward = (_array(batch[name]).astype(np.float64) for name in ("old", "value", "advantage"))
        reference = _array(batch["reference"]).astype(np.float64) if "reference" in batch else old
        nats = (old - reference) * learnt
        whole = np.take_along_axis(reward, np.maximum(documents, 0).astype(np.int64), axis=1)
        rewards = -weight * nats + whole * last_tokens(learnt, documents)
        advantages = gae(rewards, values, learnt, documents, self._options)
        return _Estimate(learnt, values, advantages), float(nats.sum())

    def _store(self, batches: MicroBatches, estimates: list[_Estimate], world: World) -> None:
        mean, deviation = (
            _moments([e.advantages[e.learnt] for e in estimates], world) if self._options.whiten else (0, 1)
        )
        for batch, estimate in zip(batches, estimates, strict=True):
            gain = (estimate.advantages - mean) / deviation * estimate.learnt
            returns = (estimate.advantages + estimate.values) * estimate.learnt
            for name, array in (("gain", gain), ("returns", returns)):
                batch[name] = torch.from_numpy(array.astype(np.float32)).to(batch["old"].device)


def _array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = tensor.cpu().numpy()
    return array


def _moments(parts: list[Floats], world: World) -> tuple[float, float]:
    """Mean and deviation over the numbers of all workers."""
    flat = np.concatenate([np.zeros(0), *parts])
    total, count = np.sum(world.gather([float(flat.sum()), float(len(flat))]), axis=0)
    mean = float(total / max(1.0, count))
    square = sum(world.gather(float(((flat - mean) ** 2).sum())))
    return mean, float((square / max(1.0, count - 1)) ** 0.5 + 1e-8)


def _explained(estimates: list[_Estimate], world: World) -> float:
    errors = [e.advantages[e.learnt] for e in estimates]
    returns = [(e.advantages + e.values)[e.learnt] for e in estimates]
    unexplained, variance = (_moments(parts, world)[1] ** 2 for parts in (errors, returns))
    return 1 - unexplained / variance if variance > 1e-12 else 0.0


class PpoObjective(AnswerObjective):
    """Clipped policy loss and clipped value loss (arXiv 1707.06347, equation 9), means over tokens.

    A batch holds what `Ppo.estimate` left. Further metrics, means over tokens: `value_loss`, `clip_fraction`,
    `value_clip_fraction`, `entropy`, `drift`, `kl` (from the reference), `engine_difference`, and those of
    `AnswerObjective.correction`, which weighs the policy loss.
    """

    values: ClassVar[bool] = True

    def __init__(self, options: RolloutOptions, ppo: PpoOptions) -> None:
        super().__init__(options)
        self.ppo = ppo
        self.clip = Clip(options.clip, options.clip_high if options.clip_high is not None else options.clip)
        self.__name__ = "ppo"

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        scores, learnt = self.scores(model, batch)
        assert scores.values is not None
        change = (scores.logprobs - shifted(batch["old"])) * learnt
        loss, binds = clipped(change.exp(), shifted(batch["gain"]), self.clip)
        squares, bound = value_loss(
            scores.values, shifted(batch["value"]), shifted(batch["returns"]), self.ppo.value_clip
        )
        correction, corrected = self.correction(shifted(batch["old"]), batch, learnt, learnt.float())
        loss = loss if correction is None else loss * correction
        total = ((loss + self.ppo.value_weight * squares) * learnt).sum()
        measured = {"value_loss": squares, "clip_fraction": binds, "value_clip_fraction": bound, "drift": change}
        metrics = {name: (value.detach() * learnt).sum() for name, value in measured.items()}
        metrics |= {"weight": learnt.sum(), "entropy": (scores.entropy * learnt).sum()}
        if "reference" in batch:
            metrics["kl"] = (divergence(scores.logprobs.detach(), shifted(batch["reference"])) * learnt).sum()
        return total, metrics | corrected | self.difference(scores, batch, learnt.float())


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Half the squared error of values, the worse of those as they are and those held within `clip` of the old ones,
    and where that bound binds; all of one shape."""
    plain = (values - returns) ** 2
    if clip is None:
        return plain / 2, torch.zeros_like(plain)
    held = (old + (values - old).clamp(-clip, clip) - returns) ** 2
    return torch.maximum(plain, held) / 2, (held > plain).float()
