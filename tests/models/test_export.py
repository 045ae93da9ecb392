"""Export and adapters: what is written loads again with equal logits, and only safetensors are read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from modelyard.errors import DataError, RecipeError
from modelyard.models import (
    AdapterOptions,
    LoraOptions,
    ModelOptions,
    add_adapter,
    build_config,
    build_on_meta,
    export_model,
    initialise,
    load_model,
    merge_adapter,
    save_adapter,
)
from modelyard.models.adapters import load_adapter
from modelyard.models.build import materialise

IDS = torch.arange(48).reshape(2, 24)


@pytest.fixture
def model() -> PreTrainedModel:
    sizes = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "max_position_embeddings": 64, "tie_word_embeddings": True}  # fmt: skip
    model = build_on_meta(build_config(ModelOptions(config=sizes), 300))
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    return model


def test_export_and_back_gives_equal_logits(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model.config, dict(model.named_parameters()), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors", "generation_config.json"}
    expected = model(input_ids=IDS).logits
    assert torch.equal(load_model(tmp_path)(input_ids=IDS).logits, expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(by_transformers(input_ids=IDS).logits, expected)
    assert by_transformers.config.use_cache


def test_export_refuses_incomplete_weights(model: PreTrainedModel, tmp_path: Path) -> None:
    state = dict(model.named_parameters())
    state.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(DataError, match="do not belong"):
        export_model(model.config, state, tmp_path)


def test_only_safetensors_are_read(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model.config, dict(model.named_parameters()), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_model(tmp_path)
    with pytest.raises(DataError, match="safetensors weights"):
        load_model(tmp_path / "absent")


def test_merged_adapter_equals_adapter(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model.config, dict(model.named_parameters()), tmp_path / "base")
    adapted = add_adapter(load_model(tmp_path / "base"), AdapterOptions(lora=LoraOptions(r=4)), seed=3)
    before = model(input_ids=IDS).logits
    assert torch.allclose(adapted(input_ids=IDS).logits, before), "an untrained adapter changes nothing"
    generator = torch.Generator().manual_seed(0)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    expected = adapted(input_ids=IDS).logits
    assert not torch.allclose(expected, before)
    save_adapter(adapted, tmp_path / "adapter")
    assert {p.name for p in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    loaded = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")
    assert torch.allclose(loaded(input_ids=IDS).logits, expected, atol=1e-5)
    merged = merge_adapter(adapted)
    export_model(model.config, dict(merged.named_parameters()), tmp_path / "merged")
    assert torch.allclose(load_model(tmp_path / "merged")(input_ids=IDS).logits, expected, atol=1e-5)


def test_adapter_weights_follow_from_the_seed(model: PreTrainedModel, tmp_path: Path) -> None:
    export_model(model.config, dict(model.named_parameters()), tmp_path)
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(states))
        adapted = add_adapter(load_model(tmp_path), AdapterOptions(), seed)
        states.append({n: p for n, p in adapted.named_parameters() if "lora_A" in n})
    assert states[0]
    assert all(torch.equal(p, states[1][n]) for n, p in states[0].items())
    assert not all(torch.equal(p, states[2][n]) for n, p in states[0].items())


def test_unknown_target_lists_the_layers(model: PreTrainedModel) -> None:
    with pytest.raises(RecipeError, match="q_proj"):
        add_adapter(model, AdapterOptions(lora=LoraOptions(targets=("no_such_layer",))), 0)
