"""Adapters over the tensor axis, alone and with other axes, train as in one process: losses, norms, what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_cases import MODELS, trained_in_turn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modelyard.align.encode import encode_preferences
from modelyard.align.options import PreferenceOptions
from modelyard.align.programs import PreferenceJob
from modelyard.align.records import Preference
from modelyard.errors import RecipeError
from modelyard.models import add_adapter, build_config, export_model, initialise, load_model
from modelyard.models.nf4 import dequantize, dequantize_part, quantize
from modelyard.models.options import AdapterOptions, Ia3Options, LoraOptions, ModelOptions, PromptOptions
from modelyard.recipe.schema import Options
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.pairs import PackedPairs, Pair, encode
from modelyard.train.parallel.parallelize import parallelize
from modelyard.train.programs import FinetuneJob
from modelyard.train.world import World

WIDE = MODELS["llama"] | {"hidden_size": 128, "intermediate_size": 256}
"""Rows and columns of a half hold whole blocks of four bits."""
BASES: dict[str, dict[str, Any]] = {
    "llama": MODELS["llama"], "wide": WIDE, "gpt2": MODELS["gpt2"], "qwen2": MODELS["llama"] | {"model_type": "qwen2"},
    "tied": MODELS["qwen3"], "mixtral": MODELS["mixtral"],
}  # fmt: skip
LORA, ATTENTION = {"lora": LoraOptions(r=4)}, ("q_proj", "v_proj", "o_proj")
Case = tuple[str, dict[str, Any], dict[str, Any]]
TWO: dict[str, Case] = {
    "LoRA, TP": ("llama", LORA, {"tensor": 2, "sequence": False}),
    "DoRA with biases, TP + SP": ("qwen2", {"lora": LoraOptions(r=4, dora=True)}, {"tensor": 2}),
    "DoRA of GPT-2, TP": ("gpt2", {"lora": LoraOptions(r=4, dora=True, rank_stabilized=True)}, {"tensor": 2}),
    "QLoRA, TP + SP": ("wide", {"lora": LoraOptions(r=4, quantize="nf4")}, {"tensor": 2}),
    "IA3 of GPT-2, TP + SP": ("gpt2", {"ia3": Ia3Options(targets=("c_attn", "c_proj"), feedforward=())}, {"tensor": 2}),
    "IA3, TP + SP": ("llama", {"ia3": Ia3Options()}, {"tensor": 2}),
    "prefix, TP": ("llama", {"prompt": PromptOptions(kind="prefix", tokens=3)}, {"tensor": 2}),
    "P-tuning, TP": ("llama", {"prompt": PromptOptions(kind="p_tuning", tokens=3, hidden=16)}, {"tensor": 2}),
    "prompt, TP": ("gpt2", {"prompt": PromptOptions(kind="prompt", tokens=3)}, {"tensor": 2}),
    "LoRA and new rows, TP + SP": ("tied", LORA | {"rows": True}, {"tensor": 2}),
    "LoRA, CP": ("llama", LORA, {"context": 2}),
    "LoRA beside experts, TP + SP": ("mixtral", {"lora": LoraOptions(targets=ATTENTION)}, {"tensor": 2}),
    "LoRA beside experts, EP": ("mixtral", {"lora": LoraOptions(targets=ATTENTION)}, {"expert": 2}),
}
PREFERENCES: dict[str, Case] = {
    "DPO, TP + SP": ("llama", {"lora": None}, {"tensor": 2}),
    "DPO of LoRA, reference by switching it off, TP": ("llama", LORA, {"tensor": 2, "sequence": False}),
}
FOUR: dict[str, Case] = {
    "LoRA, TP x FSDP": ("llama", LORA, {"tensor": 2, "shard": 2}),
    "QLoRA + DoRA, TP x FSDP": (
        "wide",
        {"lora": LoraOptions(r=4, quantize="nf4", dora=True)},
        {"tensor": 2, "shard": 2},
    ),
}


def base_model(kind: str, tokens: Path, folder: Path) -> Path:
    """A folder with a model of random weights for the tokenizer of `tokens`."""
    config = build_config(ModelOptions(config=BASES[kind]), 300)
    model = AutoModelForCausalLM.from_config(config)
    initialise(model, 0)
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zeros would hide a bias that is added twice
                parameter.normal_(std=0.1, generator=chance)
    export_model(config, model.state_dict(), folder, tokens / "tokenizer")
    return folder


def pairs(tokens: Path, folder: Path, *, rows: bool, apart: bool) -> tuple[int, int] | None:
    """Writes packed pairs; returns the ids of new tokens where `rows` asks for them."""
    words = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    first = len(words)
    if rows:
        words.add_tokens(["<sum>"], special_tokens=True)
        words.save_pretrained(folder / "tokenizer")
    told = [Pair(({"role": "user", "content": f"{i % 9}+1"},), f"{'<sum>' * rows}{i % 9 + 1}", "here")
            for i in range(90)]  # fmt: skip
    encoded = encode(told, words, 32)[0]
    packed = PackedPairs.alone(encoded, 0, 4) if apart else PackedPairs.pack(encoded, 32, 0, pad_id=4)
    for name in ("train", "heldout"):
        packed.save(folder / f"{name}.npz")
    return (first, first + 1) if rows else None


def jobs(tokens: Path, folder: Path, cases: dict[str, Case], *, split: bool) -> dict[str, FinetuneJob]:
    """One job a case, over its layout or in one process."""
    made = {}
    for name, (kind, adapter, layout) in cases.items():
        place, options = folder / name, dict(adapter)
        rows = bool(options.pop("rows", False))
        new = pairs(tokens, place / "pairs", rows=rows, apart="prompt" in options)
        rate = 3e-3 if "lora" in options else 1e-1  # a few numbers learn slowly
        train = {"steps": 10, "global_batch": 8, "micro_batch": 4, "learning_rate": rate}
        made[name] = FinetuneJob(
            model=str(base_model(kind, tokens, place / "base")),
            data=str(place / "pairs"),
            output=str(place / "out"),
            train=TrainOptions(**train, parallel=ParallelOptions(**layout if split else {})),
            adapter=AdapterOptions(**options),
            new_tokens=new,
        )
    return made


def preference_jobs(tokens: Path, folder: Path, *, split: bool) -> dict[str, PreferenceJob]:
    """As `jobs`, for alignment: log-probabilities over a vocabulary that is split too."""
    words = AutoTokenizer.from_pretrained(tokens / "tokenizer")
    told = []
    for i in range(24):
        ask, good, bad = ({"role": role, "content": chr(97 + (i + k) % 20) * (1 + i % 3)}
                          for k, role in enumerate(("user", "assistant", "assistant")))  # fmt: skip
        told.append(Preference((ask,), (good,), (bad,), f"row {i}"))
    packed = PackedPairs.pack_groups(encode_preferences(told, words, 32)[0], 64, 0, 4)
    made = {}
    for name, (kind, adapter, layout) in PREFERENCES.items():
        place = folder / name
        for side in ("train", "heldout"):
            packed.save(place / "pairs" / f"{side}.npz")
        reference = "precomputed" if adapter["lora"] is None else "adapter"
        made[name] = PreferenceJob(
            model=str(base_model(kind, tokens, place / "base")),
            data=str(place / "pairs"),
            output=str(place / "out"),
            train=TrainOptions(
                steps=10, global_batch=8, learning_rate=3e-3, parallel=ParallelOptions(**layout if split else {})
            ),
            adapter=AdapterOptions(**adapter),
            method="dpo",
            preference=PreferenceOptions(reference=reference),
        )
    return made


@pytest.mark.parametrize(("workers", "cases"), [(2, TWO), (4, FOUR)])
def test_a_split_adapter_trains_as_in_one_process(
    tokens: Path, tmp_path: Path, workers: int, cases: dict[str, Case]
) -> None:
    sides = {}
    for side in ("one", "many"):
        asked: dict[str, Options] = dict(jobs(tokens, tmp_path / side, cases, split=side == "many"))
        if workers == 2:
            asked |= preference_jobs(tokens, tmp_path / side, split=side == "many")
        sides[side] = trained_in_turn(1 if side == "one" else workers, asked, tmp_path / f"{side}.json")
    one, many = sides.values()
    assert one.keys() == many.keys()
    wrong = {}
    for name in one:
        a, b = one[name], many[name]
        rows = list(zip(a["history"], b["history"], strict=True))
        apart = max(abs(x["loss"] - y["loss"]) for x, y in rows)
        norms = max(abs(x["grad_norm"] - y["grad_norm"]) / x["grad_norm"] for x, y in rows)
        expected, found = (load_file(written_by(tmp_path / side / name / "out")) for side in ("one", "many"))
        assert found.keys() == expected.keys(), name
        written = max(float((found[key] - value).abs().max()) for key, value in expected.items())
        same = apart < 1e-5 and norms < 1e-3 and abs(a["heldout"] - b["heldout"]) < 1e-5 and written < 3e-4
        moved = all(x["grad_norm"] > 0 for x, _ in rows)
        if not (same and moved) or a["parameters"] != b["parameters"]:
            wrong[name] = (apart, norms, written, a["heldout"], b["heldout"])
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())


def written_by(folder: Path) -> Path:
    """The adapter alone where there is one, else the model."""
    adapter = folder / "adapter" / "adapter_model.safetensors"
    return adapter if adapter.exists() else folder / "model" / "model.safetensors"


@given(st.sampled_from([(8, 128), (6, 64), (4, 96), (12, 72)]), st.sampled_from([0, 1]), st.sampled_from([1, 2]))
def test_a_part_of_a_matrix_in_four_bits_is_that_of_the_whole(shape: tuple[int, int], dim: int, parts: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    state = quantize(matrix)
    whole = dequantize(state, shape)
    for index, part in enumerate(whole.chunk(parts, dim)):
        assert torch.equal(dequantize_part(state, shape, dim, parts, index), part)


def test_what_an_adapter_is_not_split_by_is_named(tokens: Path, tmp_path: Path) -> None:
    plain = load_model(base_model("llama", tokens, tmp_path))
    for options, axis in ((LORA, "pipeline"), ({"prompt": PromptOptions(tokens=3)}, "context")):
        model = add_adapter(plain, AdapterOptions(**options), 0)
        train = TrainOptions(global_batch=8, micro_batch=2, parallel=ParallelOptions(**{axis: 2}))
        with pytest.raises(RecipeError, match=f"a PeftModelForCausalLM is not split by {axis}") as caught:
            parallelize(model, train, World(0, 2, torch.device("cpu")))
        assert "shard" in caught.value.mend
        plain = model.unload() if axis == "pipeline" else plain  # type: ignore[operator]
