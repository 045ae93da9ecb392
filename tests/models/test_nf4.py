"""Four bits: the levels and the error are those of the formulas, and what is trained, kept and exported is right."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.models import AdapterOptions, LoraOptions, add_adapter, export_model, load_model, merge_adapter
from modelyard.models.adapters import load_adapter, save_adapter
from modelyard.models.nf4 import (
    BLOCK,
    GROUP,
    LEVELS,
    Nf4Linear,
    dequantize,
    logical_sizes,
    quantize,
    quantized_layers,
)
from modelyard.models.options import NF4_BITS

IDS = torch.arange(48).reshape(2, 24)
QLORA = AdapterOptions(lora=LoraOptions(r=4, quantize="nf4"))


@pytest.fixture
def base(tmp_path: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, vocab_size=300, tie_word_embeddings=True, attention_bias=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    export_model(config, dict(model.named_parameters()), tmp_path / "base")
    return load_model(tmp_path / "base")


def test_levels_are_the_quantiles_of_appendix_e() -> None:
    offset, quantile = (1 - 1 / 32 + 1 - 1 / 30) / 2, NormalDist().inv_cdf
    above = [quantile(offset + (0.5 - offset) * i / 8) for i in range(8)]
    below = [-quantile(offset + (0.5 - offset) * i / 7) for i in range(7)]
    wanted = sorted(value / above[0] for value in (*below, 0.0, *above))
    assert pytest.approx(wanted, abs=1e-6) == LEVELS


def test_each_value_becomes_the_nearest_level_of_its_block() -> None:
    weight = torch.randn(96, 50, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[3] = 0.0  # more than a block of nothing
    found = dequantize(quantize(weight), (96, 50))
    flat, levels = weight.double().reshape(-1), torch.tensor(LEVELS, dtype=torch.float64)
    magnitudes = [flat[i : i + BLOCK].abs().max() for i in range(0, len(flat), BLOCK)]
    mean = torch.stack(magnitudes).mean()
    apart = [m - mean for m in magnitudes]
    for block, start in enumerate(range(0, len(flat), BLOCK)):
        near = apart[block // GROUP * GROUP : (block // GROUP + 1) * GROUP]
        step = max(abs(a) for a in near) / 127
        kept = mean + torch.round(apart[block] / step) * step
        for i in range(start, min(start + BLOCK, len(flat)), 7):
            level = levels[(flat[i] / magnitudes[block].clamp(min=1e-30) - levels).abs().argmin()]
            assert found.reshape(-1)[i].item() == pytest.approx((level * kept).item(), abs=1e-7)


def test_error_and_bytes_are_the_papers() -> None:
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    state = quantize(weight)
    assert sum(t.nbytes for t in state) * 8 / weight.numel() == pytest.approx(NF4_BITS, abs=1e-3)
    assert pytest.approx(4.127, abs=1e-3) == NF4_BITS
    error = (dequantize(state, (1024, 1024)) - weight).pow(2).mean().sqrt().item()
    # Uniform levels of the same blocks: what normal floats have to beat (the paper's figure 3).
    blocks = weight.reshape(-1, BLOCK)
    scale = blocks.abs().amax(1, keepdim=True) / 7
    uniform = ((blocks / scale).round() * scale - blocks).pow(2).mean().sqrt().item()
    assert error < 0.095 < uniform


def test_gradients_are_those_of_the_matrix_it_stands_for() -> None:
    plain = torch.nn.Linear(40, 24)
    layer = Nf4Linear(plain)
    x, y = (torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    F.gelu(layer(x)).sum().backward()
    F.gelu(F.linear(y, layer.weight, plain.bias)).sum().backward()
    assert x.grad is not None and y.grad is not None
    assert torch.allclose(x.grad, y.grad, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("dora", [False, True])
def test_merged_and_adapter_give_what_was_trained(base: PreTrainedModel, tmp_path: Path, dora: bool) -> None:
    whole = base(input_ids=IDS).logits.detach()
    options = AdapterOptions(lora=LoraOptions(r=4, quantize="nf4", dora=dora))
    adapted = add_adapter(base, options, 0)
    assert len(quantized_layers(adapted)) == 14
    assert sum(logical_sizes(base).values()) == sum(
        p.numel() for p in load_model(tmp_path / "base").parameters()
    ) + sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    start = adapted(input_ids=IDS).logits
    assert 0 < (start - whole).abs().mean() < 0.2 * whole.abs().mean(), "near the model it came from, not equal"
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    expected = adapted(input_ids=IDS).logits.detach()
    save_adapter(adapted, tmp_path / "adapter")
    again = load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter")(input_ids=IDS).logits
    assert (again - expected).abs().mean() < 0.2 * (expected - whole).abs().mean(), "on the whole base: nearly the same"
    merged = merge_adapter(adapted)
    export_model(merged.config, dict(merged.named_parameters()), tmp_path / "merged")
    assert torch.allclose(load_model(tmp_path / "merged")(input_ids=IDS).logits, expected, atol=1e-5)


def test_only_four_bits_of_a_matrix_are_kept_for_backward() -> None:
    layer, saved = Nf4Linear(torch.nn.Linear(256, 256, bias=False)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        layer(torch.randn(2, 256, requires_grad=True)).sum().backward()
    assert sum(saved) <= 256 * 256 * 4.3 / 8


def test_a_model_without_linear_layers_is_named() -> None:
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt2", n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    )
    with pytest.raises(RecipeError, match="no layer of a GPT2LMHeadModel"):
        add_adapter(model, QLORA, 0)
