"""LoRA on mixtures of experts, and on models cut over processes: answers are those of transformers with PEFT."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import CPU
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_identity import ARCHITECTURES, prompts
from tiny import save_model
from transformers import AutoModelForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.errors import DataError

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
OPTIONS = EngineOptions(max_sequences=8, step_tokens=48, threads=1, precision="float32", block_tokens=4)
BASES = {
    # In transformers 5 "all-linear" means attention and, for the families it knows, experts and router.
    "mixtral": {"target_modules": "all-linear"},
    "qwen2-moe": {
        # Layer 0 has a plain feed-forward network.
        "target_modules": r".*(_proj|shared_expert_gate)",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"],
        "rank_pattern": {"experts.down_proj": 2},
        "alpha_pattern": {"shared_expert.down_proj": 7, "experts.gate_up_proj": 3},
    },
}


def base(name: str, folder: Path, seed: int = 0) -> Path:
    family, overrides = ARCHITECTURES[name]
    return save_model(folder, family, seed, **overrides)


def save_adapter(base: Path, folder: Path, seed: int, **changes: Any) -> None:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | changes)))
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            value.data = torch.randn_like(value) * 0.2
    adapted.save_pretrained(folder)


@torch.no_grad()
def reference(base: Path, adapter: Path | None, given: list[list[int]]) -> list[tuple[int, ...]]:
    """Greedy answers of transformers, with PEFT's own forward pass over the adapter."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    found = []
    for prompt in given:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=GREEDY.max_tokens, do_sample=False,
            eos_token_id=None,
        )  # fmt: skip
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


def requests(given: list[list[int]], adapter: str | None) -> list[Request]:
    return [Request(f"{adapter}-{i}", tuple(p), GREEDY, adapter=adapter) for i, p in enumerate(given)]


def answers(core: EngineCore, asked: list[Request]) -> list[tuple[int, ...]]:
    found = [c.output.tokens for c in generate(core, asked)]
    assert core.invariants() == []
    return found


@pytest.mark.parametrize(("name", "workers"), [("mixtral", 1), pytest.param("qwen2-moe", 2, marks=CPU)])
def test_requests_of_several_adapters_and_of_none_share_steps(
    name: str, workers: int, tmp_path: Path, cores: list[EngineCore]
) -> None:
    folder = base(name, tmp_path / "base")
    for seed in (1, 2):
        save_adapter(folder, tmp_path / f"a{seed}", seed, **BASES[name])
    core = EngineCore(folder, OPTIONS.model_copy(update={"tensor_parallel": workers}))
    cores.append(core)
    core.load_adapter("a1", tmp_path / "a1")
    core.load_adapter("a2", tmp_path / "a2")
    given = prompts(core.config.vocabulary, [3, 40])
    asked = [r for adapter in (None, "a1", "a2") for r in requests(given, adapter)]
    got = answers(core, asked)
    wanted = [reference(folder, adapter, given) for adapter in (None, tmp_path / "a1", tmp_path / "a2")]
    assert got == [tokens for each in wanted for tokens in each]
    assert len(set(got)) == len(got), "adapters matter"
    core.unload_adapter("a2")
    gc.collect()
    core.load_adapter("a2", tmp_path / "a1")
    assert answers(core, requests(given, "a2")) == wanted[1]
    assert answers(core, requests(given, None)) == wanted[0]
    if workers > 1:
        adapter = core.read_adapter("a3", tmp_path / "a1")
        (tmp_path / "a1").rename(tmp_path / "moved")
        with pytest.raises(DataError, match="a worker could not read"):
            core.add_adapter(adapter)
        assert answers(core, requests(given, "a1")) == wanted[1]


def test_adapters_that_name_every_expert_are_read_too(tmp_path: Path) -> None:
    """As PEFT wrote them when transformers kept experts apart; PEFT itself puts such ones together when it reads."""
    folder = base("mixtral", tmp_path / "base")
    save_adapter(folder, tmp_path / "now", 1, target_modules=["q_proj"])
    torch.manual_seed(3)
    tensors = load_file(tmp_path / "now" / "adapter_model.safetensors")
    for layer in range(2):
        for expert in range(4):
            for name, (rows, columns) in {"w1": (96, 64), "w2": (64, 96), "w3": (96, 64)}.items():
                module = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{module}.lora_A.weight"] = torch.randn(4, columns) * 0.2
                tensors[f"{module}.lora_B.weight"] = torch.randn(rows, 4) * 0.2
    save_file(tensors, tmp_path / "now" / "adapter_model.safetensors")
    config = LoraConfig.from_pretrained(tmp_path / "now")
    config.target_modules = {"q_proj", "w1", "w2", "w3"}
    config.save_pretrained(tmp_path / "now")
    core = EngineCore(folder, OPTIONS)
    core.load_adapter("a", tmp_path / "now")
    given = prompts(core.config.vocabulary, [20])
    got = answers(core, requests(given, "a"))
    assert got == reference(folder, tmp_path / "now", given)
    assert got != answers(core, requests(given, None))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder, wide = base("mixtral", tmp_path / "base"), save_model(tmp_path / "wide", "mixtral", hidden_size=96)
    core = EngineCore(folder, OPTIONS)
    save_adapter(wide, tmp_path / "a", 1, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(DataError, match=r"adapter's .*experts is 96 x 96"):
        core.load_adapter("a", tmp_path / "a")
    save_adapter(folder, tmp_path / "head", 1, target_modules=["lm_head"])
    with pytest.raises(DataError, match="lm_head"):
        core.load_adapter("a", tmp_path / "head")
    assert core.adapters == {}
