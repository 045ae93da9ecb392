"""What an answer is worth: rules, reward models and judges, mixed by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelyard.align.answered import Answered, Failure, Value
from modelyard.align.constraints import Multiplier, mixed
from modelyard.align.judge import Judge
from modelyard.align.options import RolloutOptions
from modelyard.align.reward_options import EarnedOptions, JudgeOptions, RewardModelOptions, VerifierOptions, needs
from modelyard.align.scoring import Ensemble, Scorer
from modelyard.align.verifiers import Verifier
from modelyard.errors import DataError, RecipeError
from modelyard.train.world import World

Floats = npt.NDArray[np.float64]


class Source(Protocol):
    """Something that rewards answers."""

    def __call__(self, answers: Sequence[Answered]) -> Sequence[Value]:
        """One number an answer, or why there is none."""
        ...

    def close(self) -> None:
        """Lets go of what it holds."""
        ...


@dataclass
class Rewards:
    """What answers are worth.

    Attributes:
        total: what the policy learns from, [n]: the weighted sum, mixed with constrained rewards.
        plain: the weighted sum alone, [n].
        means: the mean of each source.
        failures: what failed, by place.
    """

    total: Floats
    plain: Floats
    means: dict[str, float]
    failures: list[str]


class Earned:
    """What the environment paid: a source."""

    def __call__(self, answers: Sequence[Answered]) -> list[Value]:
        """One number an answer."""
        return [answer.earned for answer in answers]

    def close(self) -> None:
        """Nothing is held."""


class RewardMix:
    """All sources of a run.

    Args:
        options: `rewards`, `failed_reward` and `bad_rewards` of the rollouts.
        scorers: reward models by the names that the options use.

    Attributes:
        multipliers: of the constrained rewards, by their names.

    Raises:
        RecipeError: no source, a bad pattern or schema, a function that cannot be imported, a judge's key that is not
            set, or a reward model that is not there.
    """

    def __init__(self, options: RolloutOptions, scorers: Mapping[str, Scorer] | None = None) -> None:
        if not options.rewards:
            raise RecipeError("nothing rewards the answers", place="rollouts.rewards", mend="name a reward")
        self._failed, self._bad = options.failed_reward, options.bad_rewards
        named = [(f"{o.kind}_{number}", o) for number, o in enumerate(options.rewards)]
        self.multipliers = {name: Multiplier(o.constraint) for name, o in named if o.constraint is not None}
        self._sources = [(name, o.weight, _source(o, scorers or {})) for name, o in named]

    def __call__(self, answers: Sequence[Answered]) -> Rewards:
        """Rewards answers in order.

        Raises:
            DataError: a record lacks what a verifier compares with, or more than `bad_rewards` of the answers have a
                reward that failed.
        """
        plain, means, constrained = np.zeros(len(answers)), {}, []
        failures = [f"{answer.place}: {answer.failure}" for answer in answers if answer.failure]
        for name, weight, source in self._sources:
            values = self._values(source, answers, failures)
            means[name] = float(values.mean()) if len(values) else 0.0
            if name in self.multipliers:
                constrained.append((self.multipliers[name].value, weight * values))
            else:
                plain += weight * values
        self._check(failures, len(answers), sum(bool(answer.failure) for answer in answers))
        return Rewards(mixed(plain, constrained), plain, means, failures)

    def steer(self, means: Mapping[str, float]) -> dict[str, float]:
        """Moves the multipliers after a set of answers with these means over all workers; figures of those they were
        mixed with."""
        figures = {f"multiplier/{name}": multiplier.value for name, multiplier in self.multipliers.items()}
        for name, multiplier in self.multipliers.items():
            multiplier.update(means[name])
        return figures

    def close(self) -> None:
        """Ends the processes of functions."""
        for _, _, source in self._sources:
            source.close()

    def _values(self, source: Source, answers: Sequence[Answered], failures: list[str]) -> Floats:
        values = np.full(len(answers), self._failed)
        for i, value in enumerate(source(answers)):
            if answers[i].failure:
                continue  # its environment broke it off: no source's word counts
            if not isinstance(value, Failure) and not math.isfinite(value):
                value = Failure(f"the reward is {value}")
            if isinstance(value, Failure):
                failures.append(f"{answers[i].place}: {value.why}")
            else:
                values[i] = value
        return values

    def _check(self, failures: Sequence[str], answers: int, episodes: int) -> None:
        """`episodes`: how many of the failures, the first ones, are the environment's."""
        if len(failures) > self._bad * answers:
            raise DataError(
                f"{len(failures)} rewards of {answers} answers failed; the first: {failures[0]}",
                place="rollouts.environment" if episodes else "rollouts.rewards",
                mend="mend the function, the environment or the judge, raise its timeout, or allow more (bad_rewards)",
            )


def mean_rewards(rewards: Rewards | None, answers: int, world: World) -> dict[str, float]:
    """Each source's mean over the answers of all workers, which call it together; None = this one has none."""
    mine = {name: mean * answers for name, mean in rewards.means.items()} if rewards is not None else {}
    parts = world.gather((mine, answers))
    count = max(1, sum(n for _, n in parts))
    names = dict.fromkeys(name for part, _ in parts for name in part)
    return {name: sum(part.get(name, 0.0) for part, _ in parts) / count for name in names}


def _source(options: Any, scorers: Mapping[str, Scorer]) -> Source:
    if isinstance(options, JudgeOptions):
        return Judge(options)
    if isinstance(options, EarnedOptions):
        return Earned()
    if isinstance(options, VerifierOptions):
        return Verifier(options)
    assert isinstance(options, RewardModelOptions)
    missing = [name for name in options.models if name not in scorers]
    if missing:
        raise RecipeError(f"there is no reward model {missing[0]!r}", place="rollouts.rewards", mend=needs(missing[0]))
    return Ensemble([scorers[name] for name in options.models], options.ensemble, options.steps)
