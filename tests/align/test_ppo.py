"""PPO against a slow reference in float64 (loops, autograd, nothing packed), its KL control, and whole runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_reinforce import ALONE, job

from modelyard.align.options import PpoOptions, RolloutOptions
from modelyard.align.ppo import KlController, Ppo, PpoObjective, ValueHead, gae
from modelyard.align.reinforce import ReinforceJob, reinforce
from modelyard.align.reward_model import load_classifier, write_classifier
from modelyard.align.rollouts import _add
from modelyard.align.samples import Drawn, Prompt, Sample, pack
from modelyard.errors import RecipeError
from modelyard.models import load_model
from modelyard.models.options import AdapterOptions, LoraOptions

REWARDS = [1.0, -0.5, 0.3, 2.0]


def samples() -> list[Sample]:
    prompts = [Prompt((1, 20, 21, 2), "p", {}, "x"), Prompt((1, 2), "q", {}, "y")]
    shapes = [(30, 31, 0), (32, 0), (33, 34, 35, 36), (40,)]
    return [Sample(prompts[i % 2], Drawn(t, tuple(-1.0 for _ in t), "", True, 0)) for i, t in enumerate(shapes)]


def valued(folder: Path, seed: int | None = None) -> Any:
    """The model with a value head that says something; with a seed, all weights moved a little."""
    model: Any = load_model(folder)
    model.value_head = ValueHead(model.config.hidden_size)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        model.value_head.weight += 0.1 * torch.randn(model.value_head.weight.shape, generator=generator)
        if seed is not None:
            generator.manual_seed(seed)
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


@dataclass
class Slow:
    """One answer's numbers, Python lists by token."""

    logprobs: torch.Tensor
    values: torch.Tensor


def slow(model: Any, sample: Sample) -> Slow:
    """One answer alone, by the plain forward pass in the model's own type."""
    ids = torch.tensor([[*sample.prompt.ids, *sample.drawn.tokens]])
    output = model(input_ids=ids, output_hidden_states=True)
    logs = torch.log_softmax(output.logits[0], dim=-1)
    places = [len(sample.prompt.ids) - 1 + i for i in range(len(sample.drawn.tokens))]
    hidden, weight = output.hidden_states[-1][0], model.value_head.weight
    values = torch.stack([(hidden[p] * weight[:-1]).sum() + weight[-1] for p in places])
    return Slow(torch.stack([logs[p, t] for p, t in zip(places, sample.drawn.tokens, strict=True)]), values)


def slow_advantages(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The definition: the discounted sum of temporal differences, token by token."""
    errors = [
        rewards[t] + gamma * (values[t + 1] if t + 1 < len(values) else 0.0) - values[t] for t in range(len(rewards))
    ]
    return [sum((gamma * lam) ** k * errors[t + k] for k in range(len(errors) - t)) for t in range(len(errors))]


def slow_ppo(
    old: Any, reference: Any, model: Any, options: RolloutOptions, ppo: PpoOptions
) -> tuple[torch.Tensor, float]:
    """The mean loss over tokens of PPO on `samples`, with its graph, in float64; and the KL divergence an answer."""
    everyone, nats = [], 0.0
    for sample, reward in zip(samples(), REWARDS, strict=True):
        with torch.no_grad():
            before, first = slow(old, sample), slow(reference, sample)
        gaps = [float(a - b) for a, b in zip(before.logprobs, first.logprobs, strict=True)]
        nats += sum(gaps)
        rewards = [-options.kl * gap for gap in gaps]
        rewards[-1] += reward
        values = before.values.tolist()
        gains = slow_advantages(rewards, values, ppo.gamma, ppo.gae_lambda)
        everyone.append((sample, before, gains, [g + v for g, v in zip(gains, values, strict=True)]))
    flat = [g for _, _, gains, _ in everyone for g in gains]
    mean = sum(flat) / len(flat)
    deviation = (sum((g - mean) ** 2 for g in flat) / (len(flat) - 1)) ** 0.5 + 1e-8
    total = torch.zeros((), dtype=torch.float64)
    for sample, before, gains, returns in everyone:
        now = slow(model, sample)
        for t in range(len(sample.drawn.tokens)):
            gain = (gains[t] - mean) / deviation
            ratio = (now.logprobs[t] - before.logprobs[t]).exp()
            bounded = ratio.clamp(1 - options.clip, 1 + options.clip)
            total = total - torch.minimum(ratio * gain, bounded * gain)
            step = now.values[t] - before.values[t]
            worst = (now.values[t] - returns[t]) ** 2
            if ppo.value_clip is not None:
                held = before.values[t] + step.clamp(-ppo.value_clip, ppo.value_clip)
                worst = torch.maximum(worst, (held - returns[t]) ** 2)
            total = total + ppo.value_weight * worst / 2
    return total / len(flat), nats / len(everyone)


@pytest.mark.parametrize("changes", [{}, {"gamma": 0.9, "gae_lambda": 0.5, "value_clip": 0.05}, {"value_clip": None}])
def test_packed_losses_and_gradients_equal_a_slow_reference(model_folder: Path, changes: dict[str, Any]) -> None:
    options = RolloutOptions(kl=0.3, updates=2, rows=16, max_tokens=8, clip=0.1)
    ppo = PpoOptions(value_weight=0.7, **changes)
    old, reference, model = valued(model_folder, 1), valued(model_folder), valued(model_folder, 2)
    arrays = pack(samples(), np.asarray(REWARDS), options, 4)
    batches = [{n: torch.from_numpy(a[part]) for n, a in arrays.items()} for part in (slice(0, 1), slice(1, None))]
    for name, source, values in (("old", old, True), ("reference", reference, False)):
        with torch.no_grad():
            _add(batches, name, source, torch.no_grad(), 1.0, values)
    figures = Ppo(ppo, options.kl).estimate(batches, ALONE)
    objective = PpoObjective(options, ppo)
    results = [objective(model, batch) for batch in batches]
    weight = sum(float(metrics["weight"]) for _, metrics in results)
    loss = sum((part for part, _ in results), torch.zeros(())) / weight
    loss.backward()  # type: ignore[no-untyped-call]
    wanted_model = valued(model_folder, 2).double()
    wanted, nats = slow_ppo(old.double(), reference.double(), wanted_model, options, ppo)
    wanted.backward()  # type: ignore[no-untyped-call]
    assert weight == sum(len(s.drawn.tokens) for s in samples())
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    assert figures["kl_answer"] == pytest.approx(nats, abs=1e-5)
    assert sum(float(m["clip_fraction"]) for _, m in results) > 0, "the case must reach the clip"
    largest = max(float(p.grad.abs().max()) for p in wanted_model.parameters() if p.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), wanted_model.parameters(), strict=True):
        assert torch.allclose(ours.grad.double(), theirs.grad, atol=1e-5 * max(1.0, largest), rtol=1e-5), name


def test_advantages_stay_inside_their_answers() -> None:
    learnt = np.asarray([[False, True, True, False, True, True, False]])
    documents = np.asarray([[0, 0, 0, 1, 1, 1, -1]], dtype=np.int32)
    rewards = np.asarray([[0.0, 0.1, 1.0, 0.0, 0.2, -1.0, 0.0]])
    values = np.asarray([[0.0, 0.5, 0.25, 0.0, 0.125, -0.5, 0.0]])
    found = gae(rewards, values, learnt, documents, PpoOptions(gamma=0.9, gae_lambda=0.8))
    one = slow_advantages([0.1, 1.0], [0.5, 0.25], 0.9, 0.8)
    two = slow_advantages([0.2, -1.0], [0.125, -0.5], 0.9, 0.8)
    assert found[0] == pytest.approx([0.0, *one, 0.0, *two, 0.0])


def test_the_kl_weight_is_steered_and_bounded() -> None:
    controller = KlController(0.2, 6.0, 100)
    controller.update(6.6, 10)
    assert controller.weight == pytest.approx(0.2 * (1 + 0.1 * 0.1))
    controller.update(1e9, 100)
    assert controller.weight == pytest.approx(0.202 * 1.2)
    controller.update(-5.0, 100)
    assert controller.weight == pytest.approx(0.202 * 1.2 * 0.8)
    controller.update(0.0, 10**6)
    assert controller.weight > 0, "a set of answers larger than the horizon"
    fixed = KlController(0.2, None, 100)
    fixed.update(100.0, 100)
    assert fixed.weight == 0.2


def ppo_job(folder: Path, model: Path, words: Any, **rollouts: Any) -> ReinforceJob:
    made = job(folder, model, words, **{"kl": 0.05, "updates": 2, **rollouts})
    return made.model_copy(update={"ppo": PpoOptions(kl_target=0.5, kl_horizon=64)})


def adapted_job(folder: Path, model: Path, words: Any) -> ReinforceJob:
    return ppo_job(folder, model, words).model_copy(update={"adapter": AdapterOptions(lora=LoraOptions(r=4))})


def test_a_killed_run_goes_on_with_its_value_head_and_kl_weight(model_folder: Path, words: Any, tmp_path: Path) -> None:
    whole = reinforce(adapted_job(tmp_path / "a", model_folder, words), ALONE)

    class Killed(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 6:
            raise Killed

    again = adapted_job(tmp_path / "b", model_folder, words)
    with pytest.raises(Killed):
        reinforce(again, ALONE, stop)
    resumed = reinforce(again, ALONE)
    for name in ("reward", "loss", "kl", "kl_weight", "kl_answer", "value_loss", "explained_variance"):
        assert [r[name] for r in resumed.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5), name
    weights = [row["kl_weight"] for row in whole.history]
    assert len(set(weights)) == 4, "one weight a set of answers, each steered on"
    assert whole.history[0]["explained_variance"] == pytest.approx(0, abs=1e-6), "a new head says nothing"
    head = load_file(tmp_path / "a" / "out" / "value_head.safetensors")["value_head.weight"]
    assert head.shape == (33,)
    assert head.abs().max() > 0
    assert (tmp_path / "a" / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_reward_rises_with_a_reward_model_and_no_groups(model_folder: Path, words: Any, tmp_path: Path) -> None:
    state = dict(load_classifier(model_folder, 1).named_parameters())
    write_classifier(model_folder, AdapterOptions(lora=None), 1, state, tmp_path / "judge")
    rewards = [{"kind": "regex", "pattern": "[a-m]"}, {"kind": "reward_model", "model": "judge", "weight": 0.05}]
    made = ppo_job(tmp_path, model_folder, words, group=1, rewards=rewards, kl=0.01)
    made = made.model_copy(
        update={
            "train": made.train.model_copy(update={"steps": 56, "global_batch": 16, "learning_rate": 5e-3}),
            "reward_models": {"judge": str(tmp_path / "judge")},
        }
    )
    outcome = reinforce(made, ALONE)
    rules = [row["reward/regex_0"] for row in outcome.history]
    assert np.mean(rules[-6:]) > np.mean(rules[:6]) + 0.2
    assert {"reward/reward_model_1", "value_clip_fraction", "engine_difference_max"} <= set(outcome.history[0])
    assert max(row["engine_difference_max"] for row in outcome.history) < 1e-4
    assert load_model(tmp_path / "out" / "model").config.hidden_size == 32


@pytest.mark.parametrize(
    ("rollouts", "ppo", "complaint"),
    [
        ({"variant": "dapo"}, PpoOptions(), "ppo has no variants"),
        ({}, PpoOptions(kl_target=6.0), "no KL penalty to steer"),
        ({"group": 1}, None, "one alone cannot be"),
    ],
)
def test_options_that_contradict(
    model_folder: Path, words: Any, tmp_path: Path, rollouts: dict[str, Any], ppo: PpoOptions | None, complaint: str
) -> None:
    made = job(tmp_path, model_folder, words, **rollouts).model_copy(update={"ppo": ppo})
    with pytest.raises(RecipeError, match=complaint):
        reinforce(made, ALONE)
