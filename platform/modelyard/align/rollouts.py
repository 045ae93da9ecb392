"""Reinforcement learning as batches for the loop: the policy answers prompts, is rewarded, and learns from that.

`collect` is the program, to be read from top to bottom: weights, answers, rewards, advantages, old and reference
log-probabilities, batches. Where the answers are drawn, in this process or on engines apart, is the pool's business;
how far ahead of training, that of `staleness`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from modelyard.align.advantages import advantages, undecided
from modelyard.align.logprobs import token_scores
from modelyard.align.objectives import adapter_off
from modelyard.align.options import RolloutOptions
from modelyard.align.policy import AnswerObjective
from modelyard.align.ppo import Ppo
from modelyard.align.rewards import RewardMix, Rewards, mean_rewards
from modelyard.align.samples import Arrays, Prompt, Prompts, Sample, empty_like, pack
from modelyard.align.scoring import Scorer, Wait
from modelyard.align.supply import Supply
from modelyard.align.verifiers import repetition
from modelyard.tokens import stream_indices
from modelyard.train.data import MicroBatches
from modelyard.train.objective import first_tokens, next_tokens, positions
from modelyard.train.parallel.strategy import Strategy


class Rollouts:
    """Hands the loop the answers of the policy as it is; `train.data.Batches`.

    Everything random follows from (seed, set of answers, prompt): a run resumed from a checkpoint goes on with the
    same prompts, and without staleness with the same draws.

    Args:
        strategy: the policy in training; sharded or replicated, whole layers and sequences.
        supply: of answers.
        prompts: all tasks; a worker learns from its slice of each step's.
        objective: what the batches are for.
        mix: rewards answers.
        options: how to sample.
        batch: prompts a step, over all workers.
        sets: of answers in the whole run; none further is asked for.
        micro_batch: most packed sequences of a forward pass.
        seed: of the run.
        pad: token id at padding.
        after: token ids that the chat template puts behind an answer; reward models read them too.
        reference: the model before training, for the KL divergence of a policy without an adapter.
        ppo: estimates advantages by the policy's value head; None = from groups, by the options' variant.
    """

    def __init__(
        self,
        strategy: Strategy,
        supply: Supply,
        prompts: Prompts,
        objective: AnswerObjective,
        mix: RewardMix,
        options: RolloutOptions,
        batch: int,
        sets: int,
        micro_batch: int,
        seed: int,
        pad: int,
        after: Sequence[int] = (),
        reference: Scorer | None = None,
        ppo: Ppo | None = None,
    ) -> None:
        self._strategy, self._supply, self._prompts, self._objective = strategy, supply, prompts, objective
        self._mix, self._options, self._batch, self._sets, self._micro = mix, options, batch, sets, micro_batch
        self._seed, self._pad, self._after, self._before, self._ppo = seed, pad, tuple(after), reference, ppo
        self._held: MicroBatches = []
        self._set = -1
        self._seconds: dict[str, float] = {}
        self._means: dict[str, float] = {}
        self.shown: list[dict[str, Any]] = []
        """Some of the last answers with their rewards, for people."""

    def take(self, step: int, more: bool) -> tuple[MicroBatches, float]:
        """The answers of the set that `step` belongs to, and the seconds it took to get them.

        Raises:
            DataError: too many rewards failed.
        """
        began = time.perf_counter()
        self._objective.reset()
        number = step // self._options.updates
        if number != self._set:
            if number != self._set + 1:
                self._supply.forget()
            self._set = number
            self.collect(number)
        return self._held, time.perf_counter() - began

    def collect(self, number: int) -> None:
        """Set `number` of answers: the program of reinforcement learning, once around."""
        self._seconds = {}
        with self._timed("sync"):
            self._supply.update(number)
        self._means["sync_mib"] = self._supply.handed / 2**20
        self._ask_ahead(number)
        samples, rewards, known = self._decided(number)
        with self._timed("score"):
            gains = self._shared_advantages(rewards) if self._ppo is None else rewards.reshape(-1)
            arrays = pack(samples, gains, self._options, self._pad, known() if known is not None else None)
            self._held = self._scored(arrays)
            if self._ppo is not None:
                self._means |= self._ppo.estimate(self._held, self._strategy.world)

    @property
    def number(self) -> int:
        """Which set of answers is at hand; -1 before the first."""
        return self._set

    def figures(self) -> dict[str, float]:
        """What is known of the last set of answers: rewards, lengths, repetition, differences, where time went."""
        everyone = self._strategy.world.gather(self._objective.largest)
        seconds = {f"{name}_seconds": value for name, value in self._seconds.items()}
        largest = {"engine_difference_max": max(everyone)} if self._objective.compares else {}
        return {name: float(value) for name, value in (self._means | seconds | largest).items()}

    def greedy(self, prompts: Sequence[Prompt], version: int) -> list[Sample]:
        """Greedy answers to this worker's share of the prompts, by the policy as it is. Ends what was asked ahead."""
        self._supply.forget()
        self._supply.update(version)
        self._supply.ask("heldout", prompts, 0, 1, 0.0)
        return self._supply.take("heldout")

    def _ask_ahead(self, number: int) -> None:
        """Asks for the sets that the weights of version `number` may begin: as many ahead as staleness allows."""
        for each in range(number, min(number + self._options.staleness, self._sets - 1) + 1):
            if not self._supply.asked(_name(each, 0)):
                self._ask(each, 0)

    def _ask(self, number: int, round_: int) -> None:
        options, least = self._options, max(0, number - self._options.staleness)
        self._supply.ask(_name(number, round_), self._drawn(number, round_), number * 1000 + round_, options.group,
                         options.temperature, least, number)  # fmt: skip

    def _decided(self, number: int) -> tuple[list[Sample], npt.NDArray[np.float64], Wait | None]:
        """Answers and rewards [prompts, group] of this worker, and their reference, which a model apart scores while
        they are rewarded; groups without a difference are drawn anew a while (dynamic sampling), with other prompts."""
        options, found, known = self._options, list[Sample](), None
        rewards = np.zeros((0, options.group))
        for round_ in range(options.dynamic_sampling + 1):
            with self._timed("generate"):
                if not self._supply.asked(_name(number, round_)):
                    self._ask(number, round_)
                fresh = self._supply.take(_name(number, round_))
            if not options.dynamic_sampling:
                known = self._reference(fresh)
            with self._timed("reward"):
                judged = self._judged(fresh, round_ == 0).reshape(-1, options.group)
            if round_ == 0:
                found, rewards = fresh, judged
                self._measure(fresh, judged)
            else:
                _replace(found, rewards, fresh, judged, options.group)
            if not self._supply.agrees(bool(undecided(rewards).any())):
                break
        return found, rewards, known if known is not None else self._reference(found)

    def _drawn(self, number: int, round_: int) -> list[Prompt]:
        """The prompts of a set, those of all workers."""
        seed = self._seed + 7919 * round_
        indices = stream_indices(seed, number * self._batch, self._batch, len(self._prompts))
        return [self._prompts.prompts[i] for i in indices]

    def rewarded(self, samples: Sequence[Sample]) -> Rewards:
        """What the answers are worth. Raises DataError when too many rewards fail."""
        return self._mix([sample.answered(self._after) for sample in samples])

    def _judged(self, samples: Sequence[Sample], first: bool) -> npt.NDArray[np.float64]:
        """Rewards of this worker's answers. Those drawn first are reported and steer the constraints; later rounds,
        which not every worker has, exchange nothing."""
        rewards = self.rewarded(samples)
        if first:
            means = mean_rewards(rewards, len(samples), self._strategy.world)
            self._means |= {f"reward/{name}": mean for name, mean in means.items()} | self._mix.steer(means)
        return rewards.total

    def _measure(self, samples: Sequence[Sample], rewards: npt.NDArray[np.float64]) -> None:
        """Means over all workers of what was drawn first."""
        drawn = [s.drawn for s in samples]
        lengths, ages = [len(d.written) for d in drawn], [self._set - d.first for d in drawn]
        values = [float(rewards.sum()), float((rewards**2).sum()), float(sum(lengths)), float(len(drawn)),
                  float(sum(not d.ended for d in drawn)), sum(repetition(d.written) for d in drawn),
                  float(undecided(rewards).sum()), float(len(rewards)), float(sum(ages)),
                  float(sum(len(d.turns) // 2 + 1 for d in drawn))]  # fmt: skip
        total = np.sum(self._strategy.world.gather(values), axis=0)
        count, groups = max(1.0, total[3]), max(1.0, total[7])
        mean = total[0] / count
        self._means |= {
            "reward": mean, "reward_deviation": max(0.0, total[1] / count - mean**2) ** 0.5,
            "answer_tokens": total[2] / count, "cut_answers": total[4] / count, "repetition": total[5] / count,
            "staleness_mean": total[8] / count, "staleness_max": max(self._strategy.world.gather(max(ages, default=0))),
        }  # fmt: skip
        if self._options.group > 1:
            self._means["undecided_groups"] = total[6] / groups
        if self._options.environment is not None:
            self._means["turns"] = total[9] / count
        self.shown = [
            {"prompt": s.prompt.text, "text": "\n| ".join(s.drawn.turns) or s.drawn.text, "reward": float(r)}
            for s, r in zip(samples[:4], rewards.reshape(-1)[:4], strict=True)
        ]

    def _shared_advantages(self, rewards: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Advantages of this worker's answers, [answers]; whitening needs the rewards of all workers."""
        everyone = self._strategy.world.gather(rewards.tolist())
        before = sum(len(part) for part in everyone[: self._strategy.world.rank])
        whole = np.asarray([row for part in everyone for row in part]).reshape(-1, self._options.group)
        return advantages(whole, self._options.variant)[before : before + len(rewards)].reshape(-1)

    def _reference(self, samples: Sequence[Sample]) -> Wait | None:
        """Begins with the log-probabilities of the answers' tokens before training, where a model of its own has to be
        asked for them."""
        if self._before is None:
            return None
        return self._before.begin([((*s.prompt.ids, *s.drawn.tokens), len(s.prompt.ids)) for s in samples])

    def _scored(self, arrays: Arrays) -> MicroBatches:
        """Micro-batches, as many on every worker, with old and reference log-probabilities where they are needed."""
        device, rows = self._strategy.world.device, len(arrays["input_ids"])
        parts = max(self._strategy.world.gather(-(-rows // self._micro)))
        batches = []
        for part in np.array_split(np.arange(rows), parts):
            batch = {n: torch.from_numpy(np.ascontiguousarray(a[part])).to(device) for n, a in arrays.items()}
            batches.append(batch if len(part) else empty_like(arrays, device))
        model = self._strategy.model
        if self._options.updates > 1 or self._ppo is not None:
            _add(batches, "old", model, nullcontext(), self._options.temperature, self._ppo is not None)
        if self._options.kl and self._before is None:
            _add(batches, "reference", model, adapter_off(model), self._options.temperature)
        return batches

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - began

    def __enter__(self) -> Rollouts:
        return self

    def __exit__(self, *_: object) -> None:
        self._mix.close()


def _name(number: int, round_: int) -> str:
    """Of the prompts of a set, drawn in one of its rounds."""
    return f"{number}-{round_}"


def _replace(
    found: list[Sample],
    rewards: npt.NDArray[np.float64],
    fresh: Sequence[Sample],
    judged: npt.NDArray[np.float64],
    group: int,
) -> None:
    """Puts decided groups of a further round in the place of undecided ones."""
    free = iter(np.flatnonzero(~undecided(judged)).tolist())
    for place in np.flatnonzero(undecided(rewards)).tolist():
        donor = next(free, None)
        if donor is None:
            return
        rewards[place] = judged[donor]
        found[place * group : (place + 1) * group] = fresh[donor * group : (donor + 1) * group]


@torch.no_grad()
def _add(
    batches: MicroBatches,
    name: str,
    model: nn.Module,
    state: AbstractContextManager[None],
    temperature: float,
    values: bool = False,
) -> None:
    """Log-probabilities of all tokens under the model in some state, at the tokens' own positions, into the batches;
    with `values` those of its value head too, as `value`."""
    with state:
        for batch in batches:
            documents = batch["document_ids"]
            labels = next_tokens(batch["input_ids"], batch["loss_mask"] & ~first_tokens(documents))
            inputs = {"input_ids": batch["input_ids"], "position_ids": positions(documents), "use_cache": False}
            found = token_scores(model, inputs, labels, temperature, values)
            parts = {name: found.logprobs} | ({"value": found.values} if found.values is not None else {})
            for key, part in parts.items():
                batch[key] = torch.zeros_like(part)
                batch[key][:, 1:] = part[:, :-1]
