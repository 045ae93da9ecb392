"""Objectives over packed answers equal the plain way: one conversation a row, whole logits, no packing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modelyard.align.encode import encode_feedback, encode_preferences
from modelyard.align.logprobs import token_scores
from modelyard.align.objectives import PreferenceObjective, RewardObjective
from modelyard.align.options import PreferenceOptions, RewardOptions
from modelyard.align.programs import PreferenceJob, RewardJob, prefer, train_reward
from modelyard.align.records import Feedback, Preference
from modelyard.align.reward_model import load_classifier
from modelyard.errors import RecipeError
from modelyard.models import load_model
from modelyard.models.adapters import add_adapter
from modelyard.models.options import AdapterOptions, Ia3Options, LoraOptions
from modelyard.train.data import read
from modelyard.train.options import TrainOptions
from modelyard.train.pairs import Encoded, PackedPairs
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


def preferences(count: int = 12) -> list[Preference]:
    """The chosen answer repeats the question's letter, the rejected one another; lengths differ."""
    found = []
    for i in range(count):
        letter, other = chr(97 + i % 20), chr(98 + i % 20)
        sides = [({"role": "assistant", "content": text},) for text in (letter * (2 + i % 3), other * (1 + i % 4))]
        found.append(Preference(({"role": "user", "content": f"say {letter}"},), *sides, f"row {i}", 0.25))
    return found


def packed(words: Any, rows: int = 12) -> tuple[PackedPairs, list[tuple[Encoded, ...]]]:
    groups, indices, _ = encode_preferences(preferences(rows), words, 32)
    margins = np.full((len(indices), 2), 0.25, dtype=np.float32)
    return PackedPairs.pack_groups(groups, 64, 0, 4, {"margin": margins}), groups


@torch.no_grad()
def plain(model: Any, document: Encoded) -> tuple[float, int]:
    """Summed log-probability of the learnt tokens of one conversation, and their number."""
    ids = torch.from_numpy(document.ids.astype(np.int64))[None]
    logs = F.log_softmax(model(input_ids=ids).logits[0, :-1].double(), dim=-1)
    chosen = logs.gather(1, ids[0, 1:, None]).squeeze(1)
    learnt = torch.from_numpy(document.learnt[1:])
    return float(chosen[learnt].sum()), int(learnt.sum())


@pytest.mark.parametrize("method", ["dpo", "ipo", "orpo", "simpo"])
def test_packed_losses_equal_unpacked(model_folder: Path, words: Any, method: str) -> None:
    model = load_model(model_folder).eval()
    data, groups = packed(words)
    reference = np.zeros((len(data), data.most_documents), dtype=np.float32)
    data = data.with_values("reference", reference)
    objective = PreferenceObjective(method, PreferenceOptions(sft=0.5 if method == "dpo" else 0.0))
    loss, metrics = objective(model, read(data, np.arange(len(data)), ALONE.device))
    total = right = 0.0
    for chosen, rejected in groups:
        (c, n), (r, m) = plain(model, chosen), plain(model, rejected)
        right += c > r
        if method == "dpo":
            total += -F.logsigmoid(torch.tensor(0.1 * (c - r))).item() - 0.5 * c / n
        elif method == "ipo":
            total += (c / n - r / m - 5) ** 2
        elif method == "simpo":
            total += -F.logsigmoid(torch.tensor(2 * (c / n - r / m) - 1)).item()
        else:
            a, b = (torch.tensor(x, dtype=torch.float64).exp() for x in (c / n, r / m))
            total += -c / n - 0.1 * F.logsigmoid((a / (1 - a) / (b / (1 - b))).log()).item()
    assert metrics["weight"] == 12
    assert loss.item() / 12 == pytest.approx(total / 12, abs=2e-5)
    assert metrics["prefers"] == right


def test_kto_takes_its_baseline_from_mismatched_answers(model_folder: Path, words: Any) -> None:
    model = load_model(model_folder).eval()
    opinions = [Feedback(p.prompt, p.chosen[-1]["content"], i % 2 == 0, p.place) for i, p in enumerate(preferences(8))]
    groups, _, counts = encode_feedback(opinions, words, 32)
    assert counts.pairs == 8
    labels = np.asarray([[float(o.label)] * 2 for o in opinions], dtype=np.float32)
    data = PackedPairs.pack_groups(groups, 64, 0, 4, {"label": labels})
    data = data.with_values("reference", np.full((len(data), data.most_documents), -3.0, dtype=np.float32))
    loss, metrics = PreferenceObjective("kto", PreferenceOptions())(
        model, read(data, np.arange(len(data)), ALONE.device)
    )
    ratios = [(plain(model, own)[0] + 3, plain(model, other)[0] + 3) for own, other in groups]
    baseline = max(0.0, sum(other for _, other in ratios) / 8)
    gains = [0.1 * ((r - baseline) if o.label else (baseline - r)) for (r, _), o in zip(ratios, opinions, strict=True)]
    wanted = sum(1 - torch.sigmoid(torch.tensor(gain)).item() for gain in gains)
    assert loss.item() == pytest.approx(wanted, abs=1e-5)
    assert metrics["kl"].item() / 8 == pytest.approx(baseline, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_scores_equal_the_logits_with_gradients(model_folder: Path, temperature: float) -> None:
    model = load_model(model_folder)
    ids = torch.randint(0, 300, (3, 17), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.rand(3, 17, generator=torch.Generator().manual_seed(2)) < 0.6, ids.roll(-1, 1), -100)
    weight = torch.randn(3, 17, generator=torch.Generator().manual_seed(3))
    gradients, found = [], []
    for fused in (True, False):
        model.zero_grad()
        if fused:
            scores = token_scores(model, {"input_ids": ids}, labels, temperature)
            logprobs, entropy = scores.logprobs, scores.entropy
        else:
            logs = F.log_softmax(model(input_ids=ids).logits / temperature, dim=-1)
            learnt = labels != -100
            logprobs = logs.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2) * learnt
            entropy = -(logs.exp() * logs).sum(-1) * learnt
        (logprobs * weight).sum().backward()
        found.append((logprobs.detach(), entropy.detach()))
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4)


def test_rewards_of_packed_documents_equal_the_classifier(model_folder: Path, words: Any) -> None:
    model = load_classifier(model_folder, seed=3).eval()
    data, groups = packed(words)
    loss, metrics = RewardObjective(RewardOptions(center=0.1))(model, read(data, np.arange(len(data)), ALONE.device))
    wanted, right = 0.0, 0
    with torch.no_grad():
        for group in groups:
            c, r = (model(input_ids=torch.from_numpy(d.ids.astype(np.int64))[None]).logits.squeeze() for d in group)
            wanted += float(-F.logsigmoid(c - r - 0.25) + 0.1 * (c + r) ** 2)
            right += bool(c > r)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert metrics["accuracy"] == right


def job(kind: type, folder: Path, model: Path, words: Any, **changes: Any) -> Any:
    data, _ = packed(words, 60)
    data.save(folder / "data" / "train.npz")
    data.save(folder / "data" / "heldout.npz")
    train = TrainOptions(steps=30, global_batch=8, learning_rate=2e-2, checkpoint_every=15, async_checkpoints=False,
                         weight_decay=0.0)  # fmt: skip
    return kind(model=str(model), data=str(folder / "data"), output=str(folder / "out"), train=train, **changes)


@pytest.mark.parametrize(
    ("adapter", "preference"),
    [
        (
            AdapterOptions(lora=LoraOptions(r=4, dora=True, rank_stabilized=True)),
            PreferenceOptions(reference="adapter"),
        ),
        (AdapterOptions(lora=LoraOptions(r=4)), PreferenceOptions()),
        (AdapterOptions(ia3=Ia3Options(), lora=None), PreferenceOptions()),
    ],
    ids=["dora-adapter-off", "lora-precomputed", "ia3"],
)
def test_dpo_learns_what_is_preferred(
    model_folder: Path, words: Any, tmp_path: Path, adapter: AdapterOptions, preference: PreferenceOptions
) -> None:
    outcome = prefer(
        job(PreferenceJob, tmp_path, model_folder, words, method="dpo", adapter=adapter, preference=preference), ALONE
    )
    assert outcome.history[0]["loss"] == pytest.approx(0.6931, abs=1e-3), "policy and reference begin equal"
    assert outcome.figures["before_accuracy"] == 0.5
    assert outcome.figures["accuracy"] > (0.9 if adapter.ia3 is None else 0.6), "a few hundred factors learn less"
    assert outcome.figures["prefers"] > outcome.figures["before_prefers"]
    assert load_model(tmp_path / "out" / "model").config.hidden_size == 32
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def test_both_references_are_the_same_model(model_folder: Path, words: Any, tmp_path: Path) -> None:
    histories = []
    for reference in ("adapter", "precomputed"):
        asked = PreferenceOptions(reference=reference)  # type: ignore[arg-type]
        made = job(PreferenceJob, tmp_path / reference, model_folder, words, method="dpo", preference=asked)
        short = made.model_copy(update={"train": made.train.model_copy(update={"steps": 6})})
        histories.append([row["loss"] for row in prefer(short, ALONE).history])
    assert histories[0] == pytest.approx(histories[1], abs=1e-5)


def test_a_killed_run_resumes_against_the_first_model(model_folder: Path, words: Any, tmp_path: Path) -> None:
    made = job(PreferenceJob, tmp_path / "a", model_folder, words, method="dpo", adapter=AdapterOptions(lora=None))
    whole = prefer(made, ALONE)
    again = job(PreferenceJob, tmp_path / "b", model_folder, words, method="dpo", adapter=AdapterOptions(lora=None),
                checkpoints=str(tmp_path / "work"))  # fmt: skip

    class Killed(Exception):
        pass

    def stop(metrics: Any) -> None:
        if metrics.step == 20:
            raise Killed

    with pytest.raises(Killed):
        prefer(again, ALONE, stop)
    resumed = prefer(again, ALONE)
    assert [r["loss"] for r in resumed.history] == pytest.approx([r["loss"] for r in whole.history], abs=1e-6)


def test_a_reward_model_learns_and_is_a_classifier(model_folder: Path, words: Any, tmp_path: Path) -> None:
    outcome = train_reward(job(RewardJob, tmp_path, model_folder, words), ALONE)
    assert outcome.figures["accuracy"] > 0.9
    assert outcome.figures["calibration_error"] < 0.3
    assert abs(outcome.figures["length_correlation"]) <= 1
    assert {"accuracy_of_shorter", "accuracy_of_longer"} <= set(outcome.figures)
    model = load_classifier(tmp_path / "out" / "model").eval()
    data, _ = packed(words, 60)
    _, metrics = RewardObjective(RewardOptions())(model, read(data, np.arange(len(data)), ALONE.device))
    assert float(metrics["accuracy"]) / 60 == pytest.approx(outcome.figures["accuracy"])


def test_layouts_and_references_that_cannot_be(model_folder: Path, words: Any, tmp_path: Path) -> None:
    asked = PreferenceOptions(reference="adapter")
    made = job(PreferenceJob, tmp_path, model_folder, words, method="dpo", adapter=AdapterOptions(lora=None))
    with pytest.raises(RecipeError, match="no adapter to switch off"):
        prefer(made.model_copy(update={"preference": asked}), ALONE)
    with pytest.raises(RecipeError, match="no layer to adapt"):
        add_adapter(load_model(model_folder), AdapterOptions(ia3=Ia3Options(targets=("nothing",), feedforward=())), 0)
