"""Building: presets have the parameters they claim, weights follow from the seed, wrong shapes are named errors."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from modelyard.errors import DataError, RecipeError
from modelyard.models import PRESETS, ModelOptions, build_config, build_on_meta, count_parameters, initialise
from modelyard.models.build import materialise
from modelyard.models.presets import derived, learning_rate

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


def built(options: ModelOptions, seed: int = 0) -> torch.nn.Module:
    model = build_on_meta(build_config(options, 300))
    materialise(model, torch.device("cpu"))
    initialise(model, seed)
    return model


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("llama-4m", 4_310_784), ("llama-1b", 1_235_814_400), ("llama-8b", 8_030_261_248), ("llama-70b", 70_553_706_496)],
)
def test_presets_have_the_published_parameters(preset: str, parameters: int) -> None:
    config = build_config(ModelOptions(preset=preset), PRESETS[preset].vocab_size)
    assert count_parameters(build_on_meta(config)) == parameters


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "mistral", "gpt2", "mixtral", "qwen3_moe", "bloom"])
def test_architectures_are_initialised_completely_and_by_the_seed(model_type: str) -> None:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4} if model_type == "gpt2" else TINY
    options = ModelOptions(config={**sizes, "model_type": model_type})
    first, again, other = built(options, 1), built(options, 1), built(options, 2)
    differs = False
    for (name, a), b, c in zip(first.named_parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.isfinite(a).all(), name
        assert a.ndim < 2 or a.std() > 0, name
        differs |= not torch.equal(a, c)
    assert differs
    logits = first(input_ids=torch.arange(20)[None] % 300).logits
    assert torch.isfinite(logits).all()


def test_rules_of_an_architecture_for_whole_blocks_are_applied() -> None:
    gpt2 = built(ModelOptions(config={"model_type": "gpt2", "n_embd": 64, "n_layer": 8, "n_head": 4}))
    assert gpt2.transformer.h[3].mlp.c_fc.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert float(gpt2.transformer.h[3].mlp.c_proj.weight.std()) == pytest.approx(0.02 / 16**0.5, rel=0.05)
    config = {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    t5 = built(ModelOptions(config=config))
    attention = t5.decoder.block[0].layer[0].SelfAttention
    assert float(attention.q.weight.std()) == pytest.approx((64 * 16) ** -0.5, rel=0.05)
    assert float(attention.o.weight.std()) == pytest.approx(64**-0.5, rel=0.05)
    assert float(t5.shared.weight.std()) == pytest.approx(1.0, rel=0.05)


def test_buffers_and_ties_survive_materialisation() -> None:
    from transformers import AutoModelForCausalLM

    options = ModelOptions(config={**TINY, "tie_word_embeddings": True})
    model = built(options)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    plain = AutoModelForCausalLM.from_config(build_config(options, 300))
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(40)[None]
    assert torch.equal(model(input_ids=ids).logits, plain.eval()(input_ids=ids).logits)


def test_overrides_and_vocabulary() -> None:
    config = build_config(ModelOptions(preset="llama-8m", hidden_size=128, num_hidden_layers=2), 1000)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (128, 2, 1000)
    assert build_config(ModelOptions(preset="llama-8m", vocab_size=1024), 1000).vocab_size == 1024
    with pytest.raises(DataError, match="vocabulary of 1,000"):
        build_config(ModelOptions(preset="llama-8m", vocab_size=999), 1000)


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(RecipeError, match="attention heads"):
        build_config(ModelOptions(config={**TINY, "hidden_size": 30}), 300)
    with pytest.raises(RecipeError, match="even rotary dimension"):
        build_config(ModelOptions(config={**TINY, "hidden_size": 36}), 300)
    with pytest.raises(RecipeError, match="key-value heads"):
        build_config(ModelOptions(config={**TINY, "num_key_value_heads": 3}), 300)
    with pytest.raises(RecipeError, match="longer than the model's 64"):
        build_config(ModelOptions(config=TINY), 300, sequence_length=128)
    with pytest.raises(RecipeError, match="transformers refuses"):
        build_config(ModelOptions(config={"model_type": "no-such-model"}), 300)


def test_options_name_the_nearest_preset() -> None:
    with pytest.raises(ValidationError, match="did you mean llama-8m"):
        ModelOptions(preset="lama-8m")
    with pytest.raises(ValidationError, match="either preset or config"):
        ModelOptions()
    with pytest.raises(ValidationError, match="model_type"):
        ModelOptions(config={"hidden_size": 4})


@pytest.mark.parametrize(
    ("size", "wanted"), [("2m", 2e6), ("30m", 3e7), ("350M", 3.5e8), ("1.2b", 1.2e9), ("70b", 7e10)]
)
def test_a_size_alone_makes_a_model(size: str, wanted: float) -> None:
    shape = derived(size)
    model = build_on_meta(build_config(ModelOptions(size=size), 1000))
    ends = 1000 * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    assert count_parameters(model) - ends == pytest.approx(wanted, rel=0.15)
    assert 30 <= shape.hidden_size / shape.num_hidden_layers <= 160
    assert shape.num_attention_heads % shape.num_key_value_heads == 0


def test_larger_models_get_lower_rates_unless_told_otherwise() -> None:
    from modelyard.stages.pretrain import PretrainOptions

    rates = [learning_rate(n) for n in (1e6, 3e7, 1e9, 7e10)]
    assert rates == sorted(rates, reverse=True)
    assert rates[1] == 1e-3
    given = {"kind": "pretrain", "model": {"size": "1b"}}
    assert PretrainOptions.model_validate(given).learning_rate == 5e-4
    assert PretrainOptions.model_validate({**given, "learning_rate": 1e-4}).learning_rate == 1e-4
    for wrong in ("30", "1k", "0.1m"):
        with pytest.raises(ValidationError, match="size"):
            PretrainOptions.model_validate({"kind": "pretrain", "model": {"size": wrong}})


def test_mixtures_have_the_published_parameters() -> None:
    for name, total in (("moe-9m", 9_182_976), ("moe-8x7b", 46_702_792_704)):
        config = build_config(ModelOptions(preset=name), PRESETS[name].vocab_size)
        assert count_parameters(build_on_meta(config)) == total
