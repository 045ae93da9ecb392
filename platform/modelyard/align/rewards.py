"""What an answer is worth: rules, reward models and judges, mixed by weight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from modelyard.align.answered import Answered, Failure, Value
from modelyard.align.judge import Judge
from modelyard.align.options import RolloutOptions
from modelyard.align.reward_options import JudgeOptions, RewardModelOptions, VerifierOptions, needs
from modelyard.align.scoring import Ensemble, RewardScorer
from modelyard.align.verifiers import Verifier
from modelyard.errors import DataError, RecipeError

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
    """The weighted sum of every answer, [n]; each source's mean; and what failed, by place."""

    total: Floats
    means: dict[str, float]
    failures: list[str]


class RewardMix:
    """All sources of a run.

    Args:
        options: `rewards`, `failed_reward` and `bad_rewards` of the rollouts.
        scorers: reward models by the names that the options use.

    Raises:
        RecipeError: no source, a bad pattern or schema, a function that cannot be imported, a judge's key that is not
            set, or a reward model that is not there.
    """

    def __init__(self, options: RolloutOptions, scorers: Mapping[str, RewardScorer] | None = None) -> None:
        if not options.rewards:
            raise RecipeError("nothing rewards the answers", place="rollouts.rewards", mend="name a reward")
        self._failed, self._bad = options.failed_reward, options.bad_rewards
        self._sources = [
            (f"{o.kind}_{number}", o.weight, _source(o, scorers or {})) for number, o in enumerate(options.rewards)
        ]

    def __call__(self, answers: Sequence[Answered]) -> Rewards:
        """Rewards answers in order.

        Raises:
            DataError: a record lacks what a verifier compares with, or more than `bad_rewards` of the answers have a
                reward that failed.
        """
        total = np.zeros(len(answers))
        found = Rewards(total, {}, [])
        for name, weight, source in self._sources:
            values = self._values(source, answers, found.failures)
            found.means[name] = float(values.mean()) if len(values) else 0.0
            total += weight * values
        self._check(found.failures, len(answers))
        return found

    def close(self) -> None:
        """Ends the processes of functions."""
        for _, _, source in self._sources:
            source.close()

    def _values(self, source: Source, answers: Sequence[Answered], failures: list[str]) -> Floats:
        values = np.full(len(answers), self._failed)
        for i, value in enumerate(source(answers)):
            if not isinstance(value, Failure) and not math.isfinite(value):
                value = Failure(f"the reward is {value}")
            if isinstance(value, Failure):
                failures.append(f"{answers[i].place}: {value.why}")
            else:
                values[i] = value
        return values

    def _check(self, failures: Sequence[str], answers: int) -> None:
        if len(failures) > self._bad * answers:
            raise DataError(
                f"{len(failures)} rewards of {answers} answers failed; the first: {failures[0]}",
                place="rollouts.rewards",
                mend="mend the function or the judge, raise its timeout, or allow more (bad_rewards)",
            )


def _source(options: Any, scorers: Mapping[str, RewardScorer]) -> Source:
    if isinstance(options, JudgeOptions):
        return Judge(options)
    if isinstance(options, VerifierOptions):
        return Verifier(options)
    assert isinstance(options, RewardModelOptions)
    missing = [name for name in options.models if name not in scorers]
    if missing:
        raise RecipeError(f"there is no reward model {missing[0]!r}", place="rollouts.rewards", mend=needs(missing[0]))
    return Ensemble([scorers[name] for name in options.models], options.ensemble)
