"""Several processes over gloo: the losses of one, and exact resume when one is killed or their number changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_parts import kill_at, launch, pretraining, trained

from modelyard.models import AdapterOptions, LoraOptions, load_model
from modelyard.models.adapters import load_adapter
from modelyard.train.pairs import PackedPairs, Pair, encode
from modelyard.train.programs import FinetuneJob, finetune, pretrain
from modelyard.train.world import World


@pytest.fixture(scope="module")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return here(pretrain, pretraining(tokens, tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def together(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("together")
    return trained(pretraining(tokens, folder), 2, folder / "out.json")


def here(program: Any, job: Any) -> dict[str, Any]:
    """What `trained` returns, of a run in this process."""
    outcome = program(job, World(0, 1, torch.device("cpu")))
    return {"history": outcome.history, "heldout": outcome.heldout_loss}


def losses(result: dict[str, Any]) -> list[float]:
    assert [row["step"] for row in result["history"]] == list(range(1, 13)), "every step once"
    return [row["loss"] for row in result["history"]]


def test_two_processes_train_as_one(alone: dict[str, Any], together: dict[str, Any]) -> None:
    assert losses(together) == pytest.approx(losses(alone), abs=1e-5)
    assert together["heldout"] == pytest.approx(alone["heldout"], abs=1e-5)
    for a, b in zip(alone["history"], together["history"], strict=True):
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)


def test_a_killed_process_resumes_bit_for_bit(tokens: Path, tmp_path: Path, together: dict[str, Any]) -> None:
    job, out = pretraining(tokens, tmp_path), tmp_path / "out.json"
    kill_at(launch(job, 2, out, pause=0.05), 1, out, 6)
    result = trained(job, 2, out)
    assert "resumed from step-00000004" in result["said"][0]
    assert losses(result) == losses(together)


def test_resume_on_another_number_of_processes(tokens: Path, tmp_path: Path, alone: dict[str, Any]) -> None:
    job, out = pretraining(tokens, tmp_path), tmp_path / "out.json"
    kill_at(launch(job, 2, out, pause=0.05), 0, out, 5)
    kill_at(launch(job, 1, out, pause=0.05), 0, out, 9)
    result = trained(job, 2, out)
    assert result["said"] == ["resumed from step-00000008 (written by 1 workers)"]
    assert losses(result) == pytest.approx(losses(alone), abs=1e-5)


def test_finetuning_shards_the_adapter_and_merges_it(
    tokens: Path, tmp_path: Path, alone: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoTokenizer

    here(pretrain, pretraining(tokens, tmp_path / "base", steps=2))
    tokenizer = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    pairs = [Pair(({"role": "user", "content": f"{i} + 1"},), str(i + 1), "here") for i in range(60)]
    packed = PackedPairs.pack(encode(pairs, tokenizer, 32)[0], 32, 0, pad_id=4)
    packed.save(tmp_path / "pairs" / "train.npz")
    packed.save(tmp_path / "pairs" / "heldout.npz")
    jobs = [
        FinetuneJob(
            model=str(tmp_path / "base" / "model"),
            data=str(tmp_path / "pairs"),
            output=str(tmp_path / f"tuned{workers}"),
            train=pretraining(tokens, tmp_path).train,
            adapter=AdapterOptions(lora=LoraOptions(r=4)),
            checkpoints=str(tmp_path / f"work{workers}"),
        )
        for workers in (1, 2)
    ]
    results = [here(finetune, jobs[0]), trained(jobs[1], 2, tmp_path / "out.json", "finetune")]
    assert losses(results[1]) == pytest.approx(losses(results[0]), abs=1e-5)
    assert results[0]["heldout"] < results[0]["history"][0]["loss"]
    ids = torch.arange(30)[None]
    base = load_model(tmp_path / "base" / "model")
    merged = load_model(tmp_path / "tuned2" / "model")(input_ids=ids).logits
    adapted = load_adapter(base, tmp_path / "tuned2" / "adapter")(input_ids=ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    state = load_file(tmp_path / "tuned2" / "adapter" / "adapter_model.safetensors")
    assert state
    assert all("lora" in name for name in state)
    assert AutoTokenizer.from_pretrained(tmp_path / "tuned2" / "model").chat_template


def test_four_bits_and_rows_of_new_tokens_are_sharded_and_resumed(tokens: Path, tmp_path: Path) -> None:
    """QLoRA on two workers, killed and resumed, is QLoRA on one; the merged model is what was trained."""
    from transformers import AutoTokenizer

    here(pretrain, pretraining(tokens, tmp_path / "base", steps=2))
    words = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    rows = range(len(words), len(words) + 1)
    words.add_tokens(["<sum>"], special_tokens=True)
    words.save_pretrained(tmp_path / "pairs" / "tokenizer")
    pairs = [Pair(({"role": "user", "content": f"{i} + 1"},), f"<sum>{i + 1}", "here") for i in range(60)]
    packed = PackedPairs.pack(encode(pairs, words, 32)[0], 32, 0, pad_id=4)
    for name in ("train", "heldout"):
        packed.save(tmp_path / "pairs" / f"{name}.npz")
    jobs = [
        FinetuneJob(
            model=str(tmp_path / "base" / "model"),
            data=str(tmp_path / "pairs"),
            output=str(tmp_path / f"tuned{workers}"),
            train=pretraining(tokens, tmp_path).train,
            adapter=AdapterOptions(lora=LoraOptions(r=4, quantize="nf4")),
            new_tokens=(rows.start, rows.stop),
            checkpoints=str(tmp_path / f"work{workers}"),
        )
        for workers in (1, 2)
    ]
    one, out = here(finetune, jobs[0]), tmp_path / "out.json"
    kill_at(launch(jobs[1], 2, out, "finetune", pause=0.05), 1, out, 6)
    two = trained(jobs[1], 2, out, "finetune")
    assert any(text.startswith("resumed from step-00000004") for text in two["said"])
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert two["heldout"] < two["history"][0]["loss"] - 0.2
    merged, other = (load_model(tmp_path / f"tuned{workers}" / "model") for workers in (2, 1))
    ids = torch.arange(30)[None]
    assert torch.allclose(merged(input_ids=ids).logits, other(input_ids=ids).logits, atol=1e-4)
    adapter = tmp_path / "tuned2" / "adapter"
    assert not [p for p in adapter.iterdir() if str(tmp_path).encode() in p.read_bytes()], "no path of this machine"
    start = load_model(tmp_path / "base" / "model").get_input_embeddings().weight
    found = merged.get_input_embeddings().weight
    assert torch.equal(found[: rows.start], start[: rows.start])
    assert (found[rows.start] - start[: rows.start].mean(0)).abs().max() > 1e-3
