"""Counts must equal those of the model that transformers builds, for every family the table knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from modelyard.errors import RecipeError
from modelyard.planner import count

SMALL: dict[str, Any] = {
    "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "intermediate_size": 512,
    "vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GQA = {**SMALL, "num_key_value_heads": 2}
NO_VOCAB = {k: v for k, v in SMALL.items() if k in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
LATENT = {
    **SMALL, "num_key_value_heads": 8, "n_routed_experts": 8, "moe_intermediate_size": 128, "n_group": 2,
    "first_k_dense_replace": 1, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "topk_group": 1, "num_experts_per_tok": 2,
}  # fmt: skip
T5 = {"d_model": 256, "d_kv": 32, "d_ff": 512, "num_layers": 3, "num_heads": 8, "vocab_size": 1000}

CASES: list[tuple[str, type, dict[str, Any], str]] = [
    ("llama", hf.LlamaConfig, GQA, "causal"),
    ("llama tied, biases", hf.LlamaConfig,
     {**SMALL, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "causal"),
    ("mistral", hf.MistralConfig, GQA, "causal"),
    ("qwen2", hf.Qwen2Config, GQA, "causal"),
    ("qwen3", hf.Qwen3Config, {**GQA, "head_dim": 64}, "causal"),
    ("gemma", hf.GemmaConfig, {**SMALL, "num_key_value_heads": 1, "head_dim": 64}, "causal"),
    ("gemma2", hf.Gemma2Config, {**GQA, "head_dim": 64}, "causal"),
    ("gemma3", hf.Gemma3TextConfig, {**GQA, "head_dim": 64}, "causal"),
    ("phi", hf.PhiConfig, SMALL, "causal"),
    ("phi3", hf.Phi3Config, GQA, "causal"),
    ("olmo2", hf.Olmo2Config, GQA, "causal"),
    ("granite", hf.GraniteConfig, SMALL, "causal"),
    ("smollm3", hf.SmolLM3Config, GQA, "causal"),
    ("stablelm", hf.StableLmConfig, {**SMALL, "use_qkv_bias": True}, "causal"),
    ("starcoder2", hf.Starcoder2Config, GQA, "causal"),
    ("gpt2", hf.GPT2Config, {"n_embd": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000}, "causal"),
    ("gpt_neox", hf.GPTNeoXConfig, SMALL, "causal"),
    ("opt", hf.OPTConfig, {**SMALL, "ffn_dim": 512, "word_embed_proj_dim": 256}, "causal"),
    ("bloom", hf.BloomConfig, {"hidden_size": 256, "n_layer": 3, "n_head": 8, "vocab_size": 1000}, "causal"),
    ("falcon", hf.FalconConfig, {**NO_VOCAB, "vocab_size": 1000}, "causal"),
    ("falcon, new", hf.FalconConfig,
     {**NO_VOCAB, "vocab_size": 1000, "new_decoder_architecture": True, "num_kv_heads": 2}, "causal"),
    ("mixtral", hf.MixtralConfig, {**GQA, "num_local_experts": 4}, "causal"),
    ("qwen2_moe", hf.Qwen2MoeConfig,
     {**GQA, "num_experts": 8, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 256,
      "decoder_sparse_step": 2}, "causal"),
    ("qwen3_moe", hf.Qwen3MoeConfig,
     {**GQA, "num_experts": 8, "moe_intermediate_size": 128, "mlp_only_layers": [0]}, "causal"),
    ("olmoe", hf.OlmoeConfig, {**GQA, "num_experts": 8}, "causal"),
    ("gpt_oss", hf.GptOssConfig, {**GQA, "num_local_experts": 8, "head_dim": 32}, "causal"),
    ("deepseek_v3", hf.DeepseekV3Config, {**LATENT, "q_lora_rank": 64}, "causal"),
    ("deepseek_v2", hf.DeepseekV2Config, {**LATENT, "q_lora_rank": None}, "causal"),
    ("bert", hf.BertConfig, SMALL, "masked"),
    ("roberta", hf.RobertaConfig, SMALL, "masked"),
    ("t5", hf.T5Config, T5, "seq2seq"),
    ("t5, gated and untied", hf.T5Config, {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
     "seq2seq"),
    ("mt5", hf.MT5Config, T5, "seq2seq"),
    ("bart", hf.BartConfig,
     {"d_model": 256, "encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 8,
      "decoder_attention_heads": 8, "encoder_ffn_dim": 512, "decoder_ffn_dim": 640, "vocab_size": 1000}, "seq2seq"),
    ("vit", hf.ViTConfig, {**NO_VOCAB, "intermediate_size": 512, "num_labels": 10}, "image"),
]  # fmt: skip
BUILDERS = {
    "causal": hf.AutoModelForCausalLM, "masked": hf.AutoModelForMaskedLM,
    "seq2seq": hf.AutoModelForSeq2SeqLM, "image": hf.AutoModelForImageClassification,
}  # fmt: skip
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "config_class", "options", "task"), CASES, ids=[case[0] for case in CASES])
def test_counts_equal_the_built_model(name: str, config_class: type, options: dict[str, Any], task: str) -> None:
    config = config_class(**options)
    with torch.device("meta"):
        model = BUILDERS[task].from_config(config)
    counted = count(config.to_dict())
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.exact


def test_llama_70b_by_part() -> None:
    p = count(LLAMA_70B)
    assert p.head == pytest.approx(1.05e9, rel=0.002)
    assert p.ffn == pytest.approx(56e9, rel=0.01)
    assert p.attention == pytest.approx(12e9, rel=0.01)
    assert p.total == pytest.approx(70.55e9, rel=1e-4)


def test_vit_g_by_part() -> None:
    config = {
        "model_type": "vit", "hidden_size": 1664, "num_hidden_layers": 48, "num_attention_heads": 16,
        "intermediate_size": 8192, "image_size": 224, "patch_size": 16, "qkv_bias": False,
    }  # fmt: skip
    p = count(config)
    assert p.ffn == pytest.approx(1.3e9, rel=0.01)
    assert p.attention == pytest.approx(531e6, rel=0.002)
    # Positions of the 14 x 14 patches; HF's table has one more row, for the class token.
    assert p.positions - 1664 == pytest.approx(326e3, rel=0.001)


def test_active_parameters_of_a_mixture() -> None:
    mixtral = hf.MixtralConfig().to_dict()
    p = count(mixtral)
    assert p.total == pytest.approx(46.7e9, rel=0.002)
    assert p.active == pytest.approx(12.9e9, rel=0.002)


def test_unknown_family_is_counted_as_llama_and_says_so() -> None:
    p = count({**LLAMA_70B, "model_type": "brand-new"})
    assert p.total == count(LLAMA_70B).total
    assert not p.exact


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"])
def test_missing_key_is_named(key: str) -> None:
    config = {k: v for k, v in LLAMA_70B.items() if k != key}
    with pytest.raises(RecipeError, match=key):
        count(config)


@pytest.mark.parametrize("value", [0, -4, "many", 2.5])
def test_impossible_value_is_refused(value: object) -> None:
    with pytest.raises(RecipeError, match="hidden_size"):
        count({**LLAMA_70B, "hidden_size": value})


def test_hidden_size_that_heads_do_not_divide() -> None:
    with pytest.raises(RecipeError) as error:
        count({**LLAMA_70B, "hidden_size": 8200})
    assert "8192" in error.value.mend
