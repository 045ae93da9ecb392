"""Prompt tuning, P-tuning and prefix tuning: what is learnt is PEFT's model, and refused where it cannot work; new
tokens of a tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from transformers import AutoTokenizer

from modelyard.errors import RecipeError
from modelyard.models import export_model, load_model
from modelyard.models.adapters import add_adapter, load_adapter
from modelyard.models.embeddings import extend_embeddings
from modelyard.models.options import AdapterOptions, LoraOptions, PromptOptions
from modelyard.train.objective import completion_lm
from modelyard.train.options import TrainOptions
from modelyard.train.pairs import PackedPairs, Pair, encode
from modelyard.train.programs import FinetuneJob, finetune
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


def rows(words: Any) -> PackedPairs:
    pairs = [Pair(({"role": "user", "content": chr(97 + i % 5) * (1 + i % 3)},), "yes" * (1 + i % 2), "x")
             for i in range(24)]  # fmt: skip
    return PackedPairs.alone(encode(pairs, words, 48)[0], 0, words.pad_token_id)


def plain_loss(model: Any, data: PackedPairs) -> float:
    """Mean loss of answers by PEFT's own forward pass, a document at a time, unpadded."""
    total, count = 0.0, 0
    for i in range(len(data)):
        row = data.batch([i])
        length = int((row["document_ids"] >= 0).sum())
        ids, learnt = torch.from_numpy(row["input_ids"])[:, :length], torch.from_numpy(row["loss_mask"])[0, 1:length]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -length:][:-1]
        total += float(F.cross_entropy(logits[learnt], ids[0, 1:][learnt], reduction="sum"))
        count += int(learnt.sum())
    return total / count


@pytest.mark.parametrize("kind", ["prompt", "p_tuning", "prefix"])
def test_vectors_are_learnt_and_load_in_peft(model_folder: Path, words: Any, tmp_path: Path, kind: Any) -> None:
    data = rows(words)
    for name in ("train", "heldout"):
        data.save(tmp_path / "pairs" / f"{name}.npz")
    adapter = AdapterOptions(prompt=PromptOptions(kind=kind, tokens=4, hidden=16))
    job = FinetuneJob(
        model=str(model_folder), data=str(tmp_path / "pairs"), output=str(tmp_path / "out"), adapter=adapter,
        train=TrainOptions(steps=25, global_batch=8, micro_batch=4, learning_rate=5e-2, weight_decay=0.0),
    )  # fmt: skip
    before = plain_loss(load_model(model_folder), data)
    outcome = finetune(job, ALONE)
    assert outcome.heldout_loss is not None
    assert outcome.heldout_loss < before - 0.3
    assert not (tmp_path / "out" / "model").exists(), "vectors cannot be merged"
    assert outcome.trainable < outcome.parameters / 5
    again = load_adapter(load_model(model_folder), tmp_path / "out" / "adapter").eval()
    assert plain_loss(again, data) == pytest.approx(outcome.heldout_loss, abs=1e-4)


def test_padding_behind_a_document_changes_nothing(model_folder: Path, words: Any) -> None:
    data = rows(words)
    for kind in ("prompt", "prefix"):
        model = add_adapter(load_model(model_folder), AdapterOptions(prompt=PromptOptions(kind=kind, tokens=3)), 0)
        batch = {n: torch.from_numpy(a) for n, a in data.batch(np.arange(len(data))).items()}
        loss, metrics = completion_lm(model, batch)
        one = [completion_lm(model, {n: v[i : i + 1] for n, v in batch.items()})[0].item() for i in range(len(data))]
        assert loss.item() == pytest.approx(sum(one), rel=1e-5)
        assert float(metrics["weight"]) == batch["loss_mask"].sum()


def test_one_adapter_at_a_time() -> None:
    assert AdapterOptions.model_validate({"prompt": {"kind": "prefix"}}).lora is None
    with pytest.raises(ValidationError, match="give one of lora, ia3 and prompt"):
        AdapterOptions.model_validate({"prompt": {}, "ia3": {}})


def test_where_vectors_do_not_work() -> None:
    from modelyard.align.programs import check_alignment

    with pytest.raises(RecipeError, match="stand before every row"):
        check_alignment(TrainOptions(steps=1), AdapterOptions(prompt=PromptOptions()), None)


def write_tool_pairs(model_folder: Path, folder: Path) -> int:
    """Pairs whose answers are new tokens, with their tokenizer; the first new id."""
    words = AutoTokenizer.from_pretrained(model_folder)
    first = len(words)
    words.add_tokens(["<tool>", "</tool>"], special_tokens=True)
    words.save_pretrained(folder / "tokenizer")
    pairs = [Pair(({"role": "user", "content": chr(97 + i)},), "<tool>ok</tool>", "x") for i in range(24)]
    packed = PackedPairs.pack(encode(pairs, words, 48)[0], 48, 0, words.pad_token_id)
    for name in ("train", "heldout"):
        packed.save(folder / f"{name}.npz")
    return first


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora", [None, LoraOptions(r=4), LoraOptions(r=4, quantize="nf4")])
def test_new_tokens_begin_as_the_mean_and_are_learnt(
    model_folder: Path, tmp_path: Path, lora: LoraOptions | None, tied: bool
) -> None:
    start = load_model(model_folder)
    assert start.config.tie_word_embeddings
    if not tied:
        state = {**start.state_dict(), "lm_head.weight": start.lm_head.weight.detach().clone()}
        start.config.tie_word_embeddings = False
        export_model(start.config, state, tmp_path / "untied", model_folder)
        model_folder = tmp_path / "untied"
    first, said = write_tool_pairs(model_folder, tmp_path / "pairs"), []
    job = FinetuneJob(
        model=str(model_folder), data=str(tmp_path / "pairs"), output=str(tmp_path / "out"),
        new_tokens=(first, first + 2), adapter=AdapterOptions(lora=lora),
        train=TrainOptions(steps=40, global_batch=4, learning_rate=1e-2 if lora is None else 4e-2, weight_decay=0.0),
    )  # fmt: skip
    outcome = finetune(job, ALONE, say=said.append)
    assert "2 rows of the embeddings begin as the mean of the others" in said
    assert outcome.heldout_loss is not None
    assert outcome.heldout_loss < (0.5 if lora is None else 1.0), "the new tokens are answered with, untrained: 5.7"
    made, before = load_model(tmp_path / "out" / "model"), load_model(model_folder)
    assert made.config.vocab_size == max(first + 2, before.config.vocab_size)
    assert AutoTokenizer.from_pretrained(tmp_path / "out" / "model").convert_tokens_to_ids("</tool>") == first + 1
    rows, old = made.get_input_embeddings().weight, before.get_input_embeddings().weight
    assert (rows[first : first + 2] - old[:first].mean(0)).abs().max() > 1e-3, "trained"
    if lora is None:
        return
    assert torch.equal(rows[:first], old[:first]), "the others stay"
    extend_embeddings(before, first + 2, first)
    again = load_adapter(before, tmp_path / "out" / "adapter").eval()
    ids = torch.tensor([[5, first, 20, first + 1, 7]])
    gap = (again(input_ids=ids).logits - made(input_ids=ids).logits).abs()
    assert gap.max() < 1e-4 if lora.quantize is None else gap.mean() < 0.5
