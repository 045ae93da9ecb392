"""Reinforcement learning with the real engine: advantages, losses, weights on their way, reward that rises, resume."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from modelyard.align.advantages import advantages, undecided
from modelyard.align.answered import Answered
from modelyard.align.options import RolloutEngine, RolloutOptions, RolloutStops
from modelyard.align.policy import Clip, PolicyObjective, clipped, divergence
from modelyard.align.pool import LocalPool
from modelyard.align.reinforce import ReinforceJob, end_reason, reinforce
from modelyard.align.rewards import RewardMix
from modelyard.align.samples import Drawn, Prompt, Sample, pack
from modelyard.align.verifiers import repetition
from modelyard.align.weights import BaseWeights, Change, policy_weights
from modelyard.engine import EngineCore, Request, Sampling, generate
from modelyard.errors import DataError, RecipeError
from modelyard.models import load_model
from modelyard.models.adapters import add_adapter, merge_adapter
from modelyard.models.options import AdapterOptions, LoraOptions
from modelyard.train.options import TrainOptions
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


def test_advantages_of_each_variant_by_hand() -> None:
    rewards = np.asarray([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    deviation = rewards[0].std(ddof=1)
    assert advantages(rewards, "grpo")[0] == pytest.approx((rewards[0] - 0.25) / (deviation + 1e-4))
    assert advantages(rewards, "dr_grpo")[0] == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert advantages(rewards, "rloo")[0] == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    assert advantages(rewards, "reinforce++").mean() == pytest.approx(0, abs=1e-9)
    assert advantages(rewards, "grpo")[1] == pytest.approx([0, 0, 0, 0])
    assert undecided(rewards).tolist() == [False, True]


def test_the_clip_binds_on_the_side_that_gains() -> None:
    ratio = torch.tensor([0.5, 0.5, 1.5, 1.5, 1.25])
    gain = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    loss, binds = clipped(ratio, gain, Clip(0.2, 0.28))
    assert loss.tolist() == pytest.approx([-0.5, 0.8, -1.28, 1.5, -1.25])
    assert binds.tolist() == [False, True, True, False, False]
    assert divergence(torch.tensor([-1.0]), torch.tensor([-1.0])).item() == 0
    assert (divergence(torch.randn(50), torch.randn(50)) >= 0).all()


def samples() -> list[Sample]:
    prompt = Prompt((1, 20, 21, 2), "p", {}, "x")
    shapes = [(30, 31, 0), (32, 0), (33, 34, 35, 36)]
    return [Sample(prompt, Drawn(tokens, tuple(-1.0 for _ in tokens), "", True, 0)) for tokens in shapes]


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"])
def test_packed_policy_losses_equal_a_slow_reference(model_folder: Path, variant: Any) -> None:
    options = RolloutOptions(variant=variant, kl=0.1, updates=2, rows=16, max_tokens=8)
    gains = np.asarray([1.0, -0.5, 0.3])
    arrays = pack(samples(), gains, options, 4)
    batch = {name: torch.from_numpy(value) for name, value in arrays.items()}
    shift = torch.Generator().manual_seed(0)
    batch["old"] = -4 + torch.rand(batch["input_ids"].shape, generator=shift)
    batch["reference"] = -4 + torch.rand(batch["input_ids"].shape, generator=shift)
    model = load_model(model_folder)
    objective = PolicyObjective(options, options.max_tokens)
    loss, metrics = objective(model, batch)
    total, weight = torch.zeros(()), 0.0
    high = 0.28 if variant == "dapo" else 0.2
    for row, documents in enumerate(batch["document_ids"]):
        for number in range(int(documents.max()) + 1):
            places = (documents == number).nonzero().squeeze(1)
            logs = F.log_softmax(model(input_ids=batch["input_ids"][row, places][None]).logits[0], dim=-1)
            learnt = [i for i in range(1, len(places)) if batch["loss_mask"][row, places[i]]]
            new = torch.stack([logs[i - 1, batch["input_ids"][row, places[i]]] for i in learnt])
            old, reference = (batch[n][row, places[learnt]] for n in ("old", "reference"))
            change = new - old
            if variant == "rloo":
                change = change.sum().expand(len(learnt))
            gain = float(batch["advantage"][row, number])
            ratio = change.exp()
            each = -torch.min(ratio * gain, ratio.clamp(0.8, 1 + high) * gain)
            each = each + 0.1 * ((reference - new).exp() - (reference - new) - 1)
            by_token = variant in ("dapo", "reinforce++")
            total = total + (each.sum() / 8 if variant == "dr_grpo" else each.sum() if by_token else each.mean())
            weight += len(learnt) if by_token else 1
    assert float(metrics["weight"]) == weight
    assert loss.item() == pytest.approx(total.item(), abs=1e-4)
    loss.backward()
    fused = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    total.backward()
    for a, b in zip(fused, (p.grad for p in model.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(a, b, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("adapter", [AdapterOptions(lora=LoraOptions(r=4, dora=True)),
                                     AdapterOptions(lora=LoraOptions(targets=("q_proj", "up_proj"), quantize="nf4")),
                                     AdapterOptions(lora=LoraOptions(r=4, rank_stabilized=True)), None])  # fmt: skip
def test_the_engine_gets_what_the_trainer_has(model_folder: Path, adapter: AdapterOptions | None) -> None:
    model = load_model(model_folder)
    policy = add_adapter(model, adapter, 0) if adapter else model
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    engine = EngineCore(model_folder, RolloutEngine(max_sequences=2, max_length=32, threads=1))
    LocalPool([engine], model_folder).update_weights(policy_weights(policy, changed_only=True), 7)
    (found,) = generate(engine, [Request("a", (1, 20, 21, 2), Sampling(6, 0.0, logprobs=0), detokenize=False)])
    assert found.output.weights == 7
    ids = torch.tensor([[1, 20, 21, 2, *found.output.tokens]])
    with torch.no_grad():
        logs = F.log_softmax(policy.eval()(input_ids=ids).logits[0], dim=-1)
    wanted = [float(logs[3 + i, token]) for i, token in enumerate(found.output.tokens)]
    assert [t.logprob for t in found.output.logprobs] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_changes_make_what_peft_merges_also_where_files_are_transposed(tmp_path: Path, dora: bool) -> None:
    plain = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    plain.to(torch.bfloat16).save_pretrained(tmp_path)
    lora = LoraOptions(r=2, dora=dora, targets=("c_attn", "c_fc", "c_proj"))
    policy = add_adapter(load_model(tmp_path), AdapterOptions(lora=lora), 0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    changes = dict(policy_weights(policy, changed_only=True))
    assert all(isinstance(change, Change) for change in changes.values())
    found = dict(BaseWeights(tmp_path).whole(changes.items()))
    merged = dict(merge_adapter(policy).named_parameters())
    assert {name.split(".")[-2] for name in found} == {"c_attn", "c_fc", "c_proj"}
    for name, value in found.items():
        assert torch.allclose(value, merged[name], atol=1e-6), name
    with pytest.raises(DataError, match=r"no tensor nobody\.weight, which the adapter changes"):
        dict(BaseWeights(tmp_path).whole([("nobody.weight", next(iter(changes.values())))]))


def judged(kind: str, answer: Any, text: str, **options: Any) -> float:
    mix = RewardMix(RolloutOptions.model_validate({"rewards": [{"kind": kind, **options}]}))
    return float(mix([Answered({"answer": answer}, "x:1", "p", text)]).total[0])


@pytest.mark.parametrize(
    ("kind", "answer", "text", "options", "worth"),
    [
        ("exact", "7", " 7\n", {}, 1), ("exact", "7", "It is 7", {}, 0), ("contains", "Paris", "it is paris.", {}, 1),
        ("numeric", "#### 1,234", "so 1234.0", {}, 1), ("numeric", 7, "7 or 8", {}, 0), ("numeric", 7, "none", {}, 0),
        ("regex", None, "yes: ok", {"pattern": r"^yes\b"}, 1),
        ("json_schema", None, '{"a": 1}', {"json_schema": {"type": "object", "required": ["a"]}}, 1),
        ("json_schema", None, "{a: 1}", {"json_schema": {"type": "object"}}, 0),
        ("json", {"a": 1, "b": "x"}, ' {"b": "x",\n "a": 1}', {}, 1), ("json", {"a": 1}, '{"a": "1"}', {}, 0),
        ("json", {"a": True}, '{"a": 1}', {}, 0), ("json", {"a": 1}, 'So: {"a": 1}', {}, 0),
        ("length", None, "w " * 20, {"limit": 10}, 0.5),
        ("function", None, "abc", {"function": "operator:length_hint_of_nothing"}, None),
    ],
)  # fmt: skip
def test_verifiers(kind: str, answer: Any, text: str, options: dict[str, Any], worth: float | None) -> None:
    if worth is None:
        with pytest.raises(RecipeError, match="cannot be used"):
            judged(kind, answer, text, **options)
    else:
        assert judged(kind, answer, text, **options) == worth


def test_functions_that_raise_hang_or_return_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "import os, time\n"
        "def judge(prompt, completion, row):\n"
        "    print('noise')\n"
        "    if completion == 'hang': time.sleep(60)\n"
        "    if completion == 'die': os._exit(3)\n"
        "    if completion == 'nan': return float('nan')\n"
        "    return 1 / len(completion) + row['bonus']\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    function = {"kind": "function", "function": "my_rewards:judge", "timeout": 3.0, "weight": 2.0}
    options = {"rewards": [function], "failed_reward": -1.0, "bad_rewards": 0.9}
    mix = RewardMix(RolloutOptions.model_validate(options))
    began = time.monotonic()
    texts = ["ab", "", "nan", "hang", "die", "abcd"]
    found = mix([Answered({"bonus": 1}, f"row {i}", "p", text) for i, text in enumerate(texts)])
    mix.close()
    assert time.monotonic() - began < 60
    assert found.total.tolist() == [3.0, -2.0, -2.0, -2.0, -2.0, 2.5]
    assert [failure.split(":")[0] for failure in found.failures] == ["row 1", "row 2", "row 3", "row 4"]
    for failure, sign in zip(
        found.failures, ("ZeroDivisionError", "nan", "longer than", "ended its process"), strict=True
    ):
        assert sign in failure
    with pytest.raises(DataError, match="has no 'answer'"):
        RewardMix(RolloutOptions.model_validate({"rewards": [{"kind": "exact"}]}))([Answered({}, "x:3", "p", "t")])


def test_repetition_and_reasons_to_end() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([1] * 12) > 0.8
    history = [
        {"step": i, "kl": 0.01 * i, "answer_tokens": 10.0 + i, "repetition": 0.0, "reward": i / 40} for i in range(40)
    ]
    assert "KL divergence" in end_reason(RolloutStops(kl=0.3), history)
    assert "grown" in end_reason(RolloutStops(length=2.0), history)
    assert "mean reward" in end_reason(RolloutStops(reward=0.8), history)
    assert end_reason(RolloutStops(), history) == ""
    assert end_reason(RolloutStops(kl=0.001), history[:5]) == ""


def job(folder: Path, model: Path, words: Any, **rollouts: Any) -> ReinforceJob:
    """Answers that match `pattern` are good; random weights say nearly anything."""
    rows = []
    for i in range(24):
        text = f"<|user|>{chr(97 + i)}<|assistant|>"
        rows.append({"ids": words(text)["input_ids"], "text": text, "row": {"answer": "x"}, "place": f"row {i}"})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))
    options = {
        "group": 8,
        "max_tokens": 6,
        "rows": 64,
        "rewards": [{"kind": "regex", "pattern": "[a-m]"}],
        **rollouts,
    }
    train = TrainOptions(steps=8, global_batch=4, learning_rate=2e-2, checkpoint_every=4, async_checkpoints=False,
                         weight_decay=0.0, micro_batch=4)  # fmt: skip
    return ReinforceJob(
        model=str(model), data=str(folder), output=str(folder / "out"), train=train,
        adapter=AdapterOptions(lora=None), rollouts=RolloutOptions.model_validate(options),
        engine=RolloutEngine(max_sequences=8), checkpoints=str(folder / "work"), reports=str(folder / "out"),
    )  # fmt: skip


def test_reward_rises_and_engine_and_trainer_agree(model_folder: Path, words: Any, tmp_path: Path) -> None:
    made = job(tmp_path, model_folder, words, dynamic_sampling=1, kl=0.01)
    made = made.model_copy(update={"adapter": AdapterOptions(lora=LoraOptions(r=8)),
                                   "train": made.train.model_copy(update={"steps": 20})})  # fmt: skip
    outcome = reinforce(made, ALONE)
    rewards = [row["reward"] for row in outcome.history]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
    assert max(row["engine_difference_max"] for row in outcome.history) < 1e-4
    assert {"generate_seconds", "sync_seconds", "reward_seconds", "kl", "entropy", "clip_fraction", "answer_tokens",
            "repetition", "cut_answers", "undecided_groups", "sync_mib"} <= set(outcome.history[0])  # fmt: skip
    assert outcome.history[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert outcome.history[-1]["kl"] > 0
    shown = json.loads((tmp_path / "out" / "samples" / "step-00000001.json").read_text())
    assert shown[0]["text"].startswith("[")
    assert load_model(tmp_path / "out" / "model").config.hidden_size == 32


def test_a_killed_run_goes_on_with_the_same_prompts_and_draws(model_folder: Path, words: Any, tmp_path: Path) -> None:
    whole = reinforce(job(tmp_path / "a", model_folder, words, updates=2, kl=0.01), ALONE)

    class Killed(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 6:
            raise Killed

    again = job(tmp_path / "b", model_folder, words, updates=2, kl=0.01)
    with pytest.raises(Killed):
        reinforce(again, ALONE, stop)
    resumed = reinforce(again, ALONE)
    for name in ("reward", "loss", "kl"):
        assert [r[name] for r in resumed.history] == pytest.approx([r[name] for r in whole.history], abs=1e-5)
    assert any(abs(row["drift"]) > 1e-6 for row in whole.history[1::2]), "the second update is off-policy"
    assert math.isfinite(whole.figures["reward"])


@pytest.mark.parametrize(
    ("changes", "rollouts", "complaint"),
    [
        ({}, {"rewards": []}, "nothing rewards the answers"),
        ({}, {"rewards": [{"kind": "regex", "pattern": "("}]}, "bad pattern"),
        ({"tokens": 100, "steps": None}, {}, "no length known beforehand"),
        ({}, {"kl": 0.1, "temperature": 0.5}, "scores at temperature 1"),
    ],
)
def test_broken_configurations(
    model_folder: Path, words: Any, tmp_path: Path, changes: dict[str, Any], rollouts: dict[str, Any], complaint: str
) -> None:
    made = job(tmp_path, model_folder, words, **rollouts)
    with pytest.raises(RecipeError, match=complaint):
        reinforce(made.model_copy(update={"train": made.train.model_copy(update=changes)}), ALONE)
