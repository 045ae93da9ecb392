"""Answers asked for ahead of training: the bound of staleness, answers across an update, importance weights, resume."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment_parts import AnsweredBy
from test_reinforce import ALONE, job

from modelyard.align.options import PpoOptions, RolloutEngine, RolloutOptions
from modelyard.align.policy import PolicyObjective
from modelyard.align.pool import Answers, Ask, LocalPool
from modelyard.align.ppo import PpoObjective, ValueHead
from modelyard.align.reinforce import reinforce
from modelyard.align.samples import Drawn, Prompt, Sample, pack
from modelyard.align.supply import Supply
from modelyard.align.weights import policy_weights
from modelyard.engine import EngineCore, Sampling
from modelyard.errors import RecipeError
from modelyard.models import load_model
from modelyard.train.parallel.strategy import Strategy


class Noting(LocalPool):
    """Engines of this process for all workers; notes what it is asked and what it answers."""

    def __init__(self, folder: Path, settings: RolloutEngine, engines: int = 2) -> None:
        super().__init__([EngineCore(folder, settings) for _ in range(engines)], folder, shared=True)
        self.asked, self.answered, self.versions = list[str](), list[str](), dict[str, int]()

    def submit(self, asks: Sequence[Ask]) -> None:
        self.asked += [ask.name for ask in asks if not ask.name.startswith("heldout")]
        self.versions |= {ask.name: self._engines[0].version for ask in asks}
        super().submit(asks)

    def results(self) -> list[Answers]:
        found = super().results()
        self.answered += [name for name, _ in found if not name.startswith("heldout")]
        return found


def moved(folder: Path) -> Any:
    """The model with other weights."""
    model = load_model(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    return model


def test_engines_apart_in_step_with_training_change_nothing(model_folder: Path, words: Any, tmp_path: Path) -> None:
    changes = {"dynamic_sampling": 1, "updates": 2}
    whole = reinforce(job(tmp_path / "a", model_folder, words, **changes), ALONE)
    pools: list[Noting] = []

    def make(settings: RolloutEngine) -> Noting:
        pools.append(Noting(model_folder, settings))
        return pools[0]

    apart = reinforce(job(tmp_path / "b", model_folder, words, **changes), ALONE, roles=AnsweredBy(make))
    for name in ("reward", "loss", "answer_tokens", "grad_norm"):
        assert [r[name] for r in apart.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5)
    assert apart.figures == pytest.approx(whole.figures, abs=1e-5)
    assert {row["staleness_max"] for row in apart.history} == {0.0}
    assert sorted(pools[0].asked) == sorted(pools[0].answered)


@pytest.mark.parametrize("staleness", [1, 3])
def test_staleness_is_bounded_and_no_prompt_is_left_out(
    model_folder: Path, words: Any, tmp_path: Path, staleness: int
) -> None:
    made = job(tmp_path, model_folder, words, staleness=staleness, max_tokens=20)
    pools: list[Noting] = []

    def make(settings: RolloutEngine) -> Noting:
        pools.append(Noting(model_folder, settings, 1))
        return pools[0]

    outcome = reinforce(made, ALONE, roles=AnsweredBy(make))
    ages = [row["staleness_max"] for row in outcome.history]
    assert 0 < max(ages) <= staleness
    assert ages[0] == 0
    assert sorted(pools[0].asked) == sorted(f"{n}-0-{place}" for n in range(8) for place in range(4))
    assert sorted(pools[0].answered) == sorted(pools[0].asked), "none beyond the last set, none twice"
    for name in pools[0].asked:
        assert int(name.split("-")[0]) - pools[0].versions[name] <= staleness
    means = [row["importance_weight_mean"] for row in outcome.history]
    assert means[0] == pytest.approx(1, abs=1e-4), "drawn with the policy's own weights"
    assert any(abs(mean - 1) > 1e-4 for mean in means[1:])
    assert all(0 <= row["importance_clipped"] <= 1 for row in outcome.history)
    assert "engine_difference_max" not in outcome.history[0]


def test_an_answer_goes_on_with_new_weights(model_folder: Path) -> None:
    """Each token has the log-probability of the weights that drew it, after all tokens before it."""
    pool = LocalPool([EngineCore(model_folder, RolloutEngine(max_sequences=2, max_length=64, threads=1))], model_folder)
    prompt = Prompt((1, 20, 21, 2), "p", {}, "x")
    pool.submit([Ask("a", prompt, Sampling(20, 1.0, seed=5, logprobs=0, ignore_eos=True), 2)])
    for _ in range(8):
        assert pool.step() == []
    before = [load_model(model_folder).eval(), moved(model_folder).eval()]
    pool.update_weights(policy_weights(before[1]), 1)
    ((name, answers),) = pool.results()
    assert name == "a"
    for each in answers:
        assert (each.first, each.version, len(each.tokens)) == (0, 1, 20)
        ids = torch.tensor([[*prompt.ids, *each.tokens]])
        with torch.no_grad():
            logs = [F.log_softmax(model(input_ids=ids).logits[0], dim=-1) for model in before]
        by_model = [[float(log[3 + i, token]) for i, token in enumerate(each.tokens)] for log in logs]
        right = [[abs(a - b) < 1e-4 for a, b in zip(each.logprobs, found, strict=True)] for found in by_model]
        switch = right[0].index(False)
        assert 5 <= switch <= 8
        assert all(right[0][:switch]) and all(right[1][switch:])
        assert not any(right[1][:switch])


def test_what_is_too_old_is_never_begun_and_never_learnt_from(model_folder: Path, words: Any) -> None:
    engine = EngineCore(model_folder, RolloutEngine(max_sequences=4, max_length=64, threads=1))
    prompts = [Prompt((1, 20 + i), "p", {}, "x") for i in range(3)]

    class Late(LocalPool):
        """Says once that an answer was begun a version earlier than it was."""

        late, asked = True, 0

        def submit(self, asks: Sequence[Ask]) -> None:
            self.asked += len(asks)
            super().submit(asks)

        def results(self) -> list[Answers]:
            found = super().results()
            if not self.late:
                return found
            self.late = False
            return [(found[0][0], [replace(d, first=d.first - 1) for d in found[0][1]]), *found[1:]]

    pool = Late([engine], model_folder)
    with pytest.raises(ValueError, match="may not be begun before version 3"):
        pool.submit([Ask("a", prompts[0], Sampling(4), 1, least=3)])
    pool.asked = 0
    strategy = Strategy(load_model(model_folder), ALONE)
    supply = Supply(pool, strategy, RolloutOptions(max_tokens=4), 0)
    supply.update(3)
    supply.ask("a", prompts, 0, 2, 1.0, least=3)
    found = supply.take("a")
    assert pool.asked == 4
    assert [sample.prompt for sample in found] == [p for p in prompts for _ in range(2)]
    assert {sample.drawn.first for sample in found} == {3}


@pytest.mark.parametrize("variant", ["grpo", "dapo", "rloo"])
def test_importance_weights_by_hand(model_folder: Path, variant: Any) -> None:
    """The loss of answers that other weights drew, in float64 and answer by answer: A min(cap, p / b) ratio."""
    options = RolloutOptions(variant=variant, group=2, rows=32, staleness=2, importance_cap=1.3, max_tokens=8)
    prompt = Prompt((1, 20, 21, 2), "p", {}, "x")
    shapes, generator = [(30, 31, 0), (32, 0), (33, 34, 35, 36), (40,)], np.random.default_rng(0)
    model = load_model(model_folder).double().eval()
    samples, logs = [], []
    for tokens in shapes:
        ids = torch.tensor([[*prompt.ids, *tokens]])
        chosen = F.log_softmax(model(input_ids=ids).logits[0], dim=-1)[3 : 3 + len(tokens)]
        logs.append(torch.stack([row[token] for row, token in zip(chosen, tokens, strict=True)]))
        noise = generator.normal(0, 0.5, len(tokens))
        samples.append(Sample(prompt, Drawn(tokens, tuple(logs[-1].detach().numpy() - noise), "", True, 0)))
    gains = np.asarray([1.0, -0.5, 0.3, 2.0])
    arrays = pack(samples, gains, options, 1)
    batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
    single = load_model(model_folder).eval()
    loss, metrics = PolicyObjective(options, 8)(single, batch)
    total, weights, bound, count = torch.zeros((), dtype=torch.float64), 0.0, 0.0, 0
    for sample, new, gain in zip(samples, logs, gains, strict=True):
        gap = new.detach() - torch.tensor(sample.drawn.logprobs, dtype=torch.float64)
        gap = gap.sum().expand(len(gap)) if variant == "rloo" else gap
        weight = gap.exp().clamp(max=1.3)
        ratio = new - new.detach()
        ratio = ratio.sum().expand(len(ratio)) if variant == "rloo" else ratio
        each = -weight * ratio.exp() * gain
        total = total + (each.sum() if variant == "dapo" else each.mean())
        weights += float(weight.sum() if variant == "dapo" else weight.mean())
        bound += float((gap.exp() > 1.3).double().sum() if variant == "dapo" else (gap.exp() > 1.3).double().mean())
        count += len(new) if variant == "dapo" else 1
    assert float(metrics["weight"]) == count
    assert loss.item() == pytest.approx(total.item(), abs=1e-5)
    assert float(metrics["importance_weight_mean"]) == pytest.approx(weights, abs=1e-5)
    assert float(metrics["importance_clipped"]) == pytest.approx(bound, abs=1e-5)
    assert 0 < bound < count
    loss.backward()
    total.backward()
    wanted = [p.grad for p in model.parameters() if p.grad is not None]
    for a, b in zip([p.grad for p in single.parameters() if p.grad is not None], wanted, strict=True):
        assert torch.allclose(a.double(), b, atol=1e-4, rtol=1e-4)


def test_ppo_weighs_its_policy_loss_alone(model_folder: Path) -> None:
    """With every token twice as likely to the policy as to what drew it, a cap of 1.5 counts the policy loss 1.5 times,
    and the value loss once."""
    model = load_model(model_folder)
    model.value_head = ValueHead(model.config.hidden_size)
    prompt = Prompt((1, 20, 21, 2), "p", {}, "x")
    samples = [Sample(prompt, Drawn(t, tuple(-1.0 for _ in t), "", True, 0)) for t in ((30, 31, 0), (32, 0))]
    losses = {}
    for staleness, weight in ((0, 0.1), (0, 0.0), (1, 0.1)):
        options = RolloutOptions(group=1, rows=16, staleness=staleness, importance_cap=1.5)
        batch = {n: torch.from_numpy(a) for n, a in pack(samples, np.ones(2), options, 1).items()}
        batch["old"] = batch["engine"] + math.log(2) * batch["loss_mask"]
        batch |= {name: batch["loss_mask"].float() * n for name, n in (("gain", 0.7), ("returns", 2.0), ("value", 0.0))}
        loss, metrics = PpoObjective(options, PpoOptions(value_weight=weight))(model, batch)
        losses[staleness, weight] = loss.item()
    value = losses[0, 0.1] - losses[0, 0.0]
    assert losses[1, 0.1] == pytest.approx(1.5 * losses[0, 0.0] + value, rel=1e-5)
    assert float(metrics["importance_weight_mean"] / metrics["weight"]) == pytest.approx(1.5)
    assert float(metrics["importance_clipped"] / metrics["weight"]) == 1


def test_a_killed_run_asks_again_for_what_was_in_flight(model_folder: Path, words: Any, tmp_path: Path) -> None:
    made = job(tmp_path, model_folder, words, staleness=2)

    class Killed(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 6:
            raise Killed

    pools: list[Noting] = []

    def make(settings: RolloutEngine) -> Noting:
        pools.append(Noting(model_folder, settings, 1))
        return pools[-1]

    with pytest.raises(Killed):
        reinforce(made, ALONE, stop, roles=AnsweredBy(make))
    resumed = reinforce(made, ALONE, roles=AnsweredBy(make))
    assert [row["step"] for row in resumed.history] == list(range(1, 9))
    # The checkpoint is of step 4: sets 4 and 5 were trained after it, and are trained again from there.
    assert sorted(pools[1].answered) == sorted(f"{n}-0-{place}" for n in range(4, 8) for place in range(4))
    assert max(row["staleness_max"] for row in resumed.history) <= 2


def test_staleness_needs_temperature_one_and_roles_apart_need_ray(
    model_folder: Path, words: Any, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="known at temperature 1"):
        reinforce(job(tmp_path / "a", model_folder, words, staleness=1, temperature=0.7), ALONE)
    reward = {"kind": "reward_model", "model": "judge"}
    apart: list[dict[str, Any]] = [{"engines": {"count": 2}}, {"reference": {"count": 1}, "kl": 0.1},
                                   {"reward_models": {"count": 1}, "rewards": [reward]}]  # fmt: skip
    for number, options in enumerate(apart):
        with pytest.raises(RecipeError, match="are Ray actors"):
            reinforce(job(tmp_path / str(number), model_folder, words, **options), ALONE)
