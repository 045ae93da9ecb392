"""Blocks with gradients by hand: losses and gradients of transformers and PEFT, and their own way where they must."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from modelyard.models import ModelOptions, build_config, initialise
from modelyard.models.adapters import add_adapter
from modelyard.models.build import build_on_meta, materialise
from modelyard.models.options import AdapterOptions, LoraOptions
from modelyard.train import fused
from modelyard.train.fused import fuse
from modelyard.train.objective import causal_lm_by_document
from modelyard.train.parallel.recompute import recompute

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip
BATCH = {
    "input_ids": torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0)),
    "document_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 12]),
}


def model(kind: str, lora: LoraOptions | None = None, **more: Any) -> nn.Module:
    config = build_config(ModelOptions(config=SHAPE | {"model_type": kind} | more), 64)
    built = build_on_meta(config)
    materialise(built, torch.device("cpu"))
    initialise(built, 0)
    if lora is None:
        return built.train()
    adapted = add_adapter(built, AdapterOptions(lora=lora), 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return adapted.train()


def gradients(trained: nn.Module) -> dict[str, torch.Tensor]:
    """Gradients by name, and the loss."""
    torch.manual_seed(0)
    loss, _ = causal_lm_by_document(trained, BATCH)
    loss.backward()  # type: ignore[no-untyped-call]
    return {"loss": loss.detach()} | {n: p.grad for n, p in trained.named_parameters() if p.grad is not None}


def assert_same(plain: nn.Module, ours: nn.Module) -> None:
    expected, found = gradients(plain), gradients(ours)
    assert expected.keys() == found.keys()
    for name, wanted in expected.items():
        # Rounding is that of sums whose terms are larger than a gradient that happens to be small.
        assert torch.allclose(wanted, found[name], rtol=2e-5, atol=2e-5), name


def replaced(ours: nn.Module) -> set[str]:
    return {kind.__name__ for m in ours.modules() for kind in type(m).__mro__ if kind.__module__ == fused.__name__}


MODELS = {
    "llama": ({}, {"_Norm", "_Gated", "_Attention"}),
    "mistral": ({"sliding_window": 4}, {"_Norm", "_Gated", "_Attention"}),
    "qwen2": ({}, {"_Norm", "_Gated", "_Attention"}),  # biases on queries, keys and values
    "qwen3": ({}, {"_Norm", "_Gated"}),  # norms between products and rotation
    "gpt2": ({}, set()),
}


@pytest.mark.parametrize("kind", MODELS)
def test_whole_models_learn_the_same(kind: str) -> None:
    more, wanted = MODELS[kind]
    plain = model(kind, **more)
    ours = copy.deepcopy(plain)
    fuse(ours)
    assert replaced(ours) == wanted
    assert_same(plain, ours)


@pytest.mark.parametrize("lora", [{}, {"dora": True}, {"dropout": 0.5}, {"rank_stabilized": True}])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_adapters_learn_the_same(kind: str, lora: dict[str, Any]) -> None:
    plain = model(kind, LoraOptions(r=4, alpha=8, **lora))
    ours = copy.deepcopy(plain)
    fuse(ours)
    assert "_Adapted" in replaced(ours)
    assert_same(plain, ours)


def test_an_adapter_that_is_off_changes_nothing() -> None:
    ours: Any = model("llama", LoraOptions(r=4, alpha=8))
    fuse(ours)
    with ours.disable_adapter():
        off = causal_lm_by_document(ours, BATCH)[0]
    assert torch.allclose(off, causal_lm_by_document(model("llama"), BATCH)[0])
    assert not torch.allclose(off, causal_lm_by_document(ours, BATCH)[0])


def test_blocks_may_recompute() -> None:
    plain = model("llama", LoraOptions(r=4, alpha=8))
    ours: Any = copy.deepcopy(plain)
    fuse(ours)
    for block in ours.base_model.model.model.layers:
        recompute(block, "full")
    assert_same(plain, ours)


def test_hooks_of_a_layer_are_still_called() -> None:
    ours: Any = model("llama")
    fuse(ours)
    called: list[int] = []
    ours.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: called.append(1))
    ours.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: called.append(2))
    assert_same(model("llama"), ours)
    assert called == [1, 2]


def test_other_types_take_their_own_way() -> None:
    plain, ours = model("llama"), model("llama")
    fuse(ours)
    with torch.autocast("cpu", torch.bfloat16):
        losses = [causal_lm_by_document(m, BATCH)[0] for m in (plain, ours)]
    assert torch.equal(*losses)
