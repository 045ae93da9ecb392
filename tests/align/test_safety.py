"""Constraints by Lagrange multipliers, refusals told by their words, and a run that is held to a constraint."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_reinforce import ALONE, job

from modelyard.align.answered import Answered
from modelyard.align.constraints import Multiplier, mixed
from modelyard.align.options import RolloutOptions
from modelyard.align.refusals import Rate, rates, refuses
from modelyard.align.reinforce import reinforce
from modelyard.align.reward_options import ConstraintOptions
from modelyard.align.rewards import RewardMix
from modelyard.errors import DataError


def test_a_multiplier_rises_while_its_reward_is_too_low_and_falls_after() -> None:
    multiplier = Multiplier(ConstraintOptions(at_least=1.0, start=2.0, rate=0.5, most=3.0))
    multiplier.update(0.8)
    assert multiplier.value == pytest.approx(2 * math.exp(0.5 * 2 * 0.2))
    before = multiplier.value
    multiplier.update(-50.0)
    assert multiplier.value == pytest.approx(3.0), "bounded"
    multiplier.update(1.5)
    assert multiplier.value < before


def test_rewards_are_mixed_with_what_is_constrained() -> None:
    reward, safety = np.asarray([1.0, 0.0]), np.asarray([-1.0, 3.0])
    assert mixed(reward, [(2.0, safety)]).tolist() == pytest.approx([-1 / 3, 2.0])
    assert mixed(reward, []).tolist() == [1.0, 0.0]
    rewards = [{"kind": "regex", "pattern": "a"}, {"kind": "regex", "pattern": "b", "constraint": {"at_least": 0.5}}]
    mix = RewardMix(RolloutOptions.model_validate({"rewards": rewards}))
    found = mix([Answered({}, "x", "p", text) for text in ("a", "b")])
    assert found.total.tolist() == [0.5, 0.5]
    assert found.plain.tolist() == [1.0, 0.0]
    assert mix.steer({"regex_1": 0.0}) == {"multiplier/regex_1": 1.0}
    assert mix.multipliers["regex_1"].value == pytest.approx(math.exp(0.05))


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m really sorry, I cannot assist.", True),
        ("As an AI language model, I am not able to give medical advice.", True),
        ("I won't help to forge a prescription: it is dangerous.", True),
        ("My apologies, this is not something I can answer.", True),
        ("Sorry, I have to decline.", True),
        ("Find its number with ps, then run kill and the number.", False),
        ("Sure! First, you can't go wrong with a sharp knife.", False),
        ("He could not come, so we are sorry for him.", False),
        ("Use a live trap. " * 20 + "I cannot say more.", False),
        ("", False),
    ],
)
def test_refusals_are_told_by_their_beginning(text: str, refused: bool) -> None:
    assert refuses(text) is refused


def test_rates_of_what_should_and_what_should_not_be_refused() -> None:
    no, yes = "I can't help with that.", "Gladly."
    bad, good = rates([(True, no), (True, yes), (True, no), (False, yes), (False, no)])
    assert (bad, good) == (Rate(2, 3), Rate(1, 2))
    low, high = Rate(8, 10).interval
    assert (round(low, 3), round(high, 3)) == (0.49, 0.943), "Wilson's example"
    assert Rate(0, 0).interval == (0.0, 1.0)


def test_a_verifier_of_refusals_needs_a_label() -> None:
    mix = RewardMix(RolloutOptions.model_validate({"rewards": [{"kind": "refusal"}]}))
    texts = [("unsafe", "I can't."), ("unsafe", "Gladly."), ("safe", "Gladly."), ("safe", "I refuse.")]
    answers = [Answered({"label": label}, "x", "p", text) for label, text in texts]
    assert mix(answers).total.tolist() == [1, 0, 1, 0]
    with pytest.raises(DataError, match="no 'label'"):
        mix([Answered({}, "x:3", "p", "t")])


def test_a_run_is_held_to_its_constraint_and_resumes_with_it(model_folder: Path, words: Any, tmp_path: Path) -> None:
    """Any letter of a to m is worth something, but half of the answers must have one of n to z."""
    bound = {"at_least": 0.9, "rate": 0.5}
    rewards = [
        {"kind": "regex", "pattern": "[a-m]", "weight": 0.2},
        {"kind": "regex", "pattern": "[n-z]", "constraint": bound},
    ]

    class Killed(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 6:
            raise Killed

    whole = reinforce(job(tmp_path / "a", model_folder, words, rewards=rewards), ALONE)
    with pytest.raises(Killed):
        reinforce(job(tmp_path / "b", model_folder, words, rewards=rewards), ALONE, stop)
    resumed = reinforce(job(tmp_path / "b", model_folder, words, rewards=rewards), ALONE)
    for name in ("reward", "loss", "reward/regex_1", "multiplier/regex_1"):
        assert [r[name] for r in resumed.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5), name
    multipliers = [row["multiplier/regex_1"] for row in whole.history]
    low = whole.history[0]["reward/regex_1"] < 0.9
    assert (multipliers[1] > multipliers[0]) is low
    assert {"reward", "regex_0", "regex_1", "before_reward", "before_regex_1"} <= set(whole.figures)
