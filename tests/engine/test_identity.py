"""Greedy answers are those of transformers, token by token, on every architecture and option that claims it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from marks import CPU
from tiny import save_model
from transformers import AutoModelForCausalLM

from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate
from modelyard.engine.batch import lay_out
from modelyard.engine.options import Precision

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-head-dim": ("llama", {"head_dim": 24}),
    "llama-rope-linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "llama-rope-llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "llama-rope-yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "mistral-window": ("mistral", {"sliding_window": 24}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "smollm3": ("smollm3", {"pad_token_id": 1, "no_rope_layer_interval": 2}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "head_dim": 16,
            "norm_topk_prob": True,
        },
    ),
}


def prompts(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, vocabulary, (n,), generator=generator).tolist() for n in lengths]


def reference(folder: Path, prompt: list[int], tokens: int) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None
    )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def answers(core: EngineCore, given: list[list[int]], tokens: int) -> list[list[int]]:
    sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(str(i), tuple(p), sampling) for i, p in enumerate(given)]
    return [list(c.output.tokens) for c in generate(core, requests)]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    family, overrides = ARCHITECTURES[name]
    folder = save_model(tmp_path / name, family, **overrides)
    # Lengths that are cut into chunks, share steps and end at different times.
    core = EngineCore(folder, EngineOptions(max_sequences=3, step_tokens=17, precision="float32"))
    given = prompts(core.config.vocabulary, [1, 5, 40, 33, 2])
    got = answers(core, given, 24)
    assert got == [reference(folder, p, 24) for p in given]
    assert core.invariants() == []
    assert core.scheduler.slots.used == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_answers_do_not_depend_on_the_step_budget(tiny_model: Path, precision: Precision) -> None:
    seen = []
    for budget, slots in ((1, 1), (7, 2), (64, 8), (512, 4)):
        core = EngineCore(tiny_model, EngineOptions(max_sequences=slots, step_tokens=budget, precision=precision))
        seen.append(answers(core, prompts(core.config.vocabulary, [60, 3, 17, 1, 90, 12]), 20))
    assert all(s == seen[0] for s in seen)


@CPU
@pytest.mark.parametrize(("precision", "most"), [("float16_packed", 5e-3), ("bfloat16", 0.1)])
def test_packed_weights_change_logits_by_little(tiny_model: Path, precision: Precision, most: float) -> None:
    exact = EngineCore(tiny_model, EngineOptions(max_sequences=1, precision="float32"))
    packed = EngineCore(tiny_model, EngineOptions(max_sequences=1, precision=precision))
    logits = []
    for core in (exact, packed):
        core.add(Request("a", tuple(prompts(core.config.vocabulary, [30])[0]), Sampling(max_tokens=1)))
        hidden = core.decoder.forward(lay_out(core.scheduler.schedule().pieces))
        logits.append(core.decoder.logits(hidden))
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert 0 < error < most
