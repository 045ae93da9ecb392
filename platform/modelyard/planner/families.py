"""What model families differ in: one row a `model_type`, every trait relative to Llama's block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Traits of a family.

    A trait given as a string is a config key to look up (`!key` for its opposite). `norm` is `rms`
    (a scale), `layer` (scale and shift) or `none`; `norms` counts those of one layer and `norm`s of
    queries and keys come by `qk_norm`: `head` (one vector of a head's size each) or `full` (the whole
    projected width). `chosen` (experts a token) and `activation` are what the class assumes where the
    config does not say.
    """

    kind: str = "decoder"
    gated: bool | str = True
    norm: str = "rms"
    norms: int = 2
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    ffn_bias: bool | str = False
    qk_norm: str = ""
    tied: bool = False
    final_norm: bool = True
    embedding_norm: bool = False
    learned_positions: bool = False
    position_offset: int = 0
    head_bias: bool = False
    sparse: bool = False
    router_bias: bool = False
    shared_gate: bool = False
    latent: bool = False
    multi_query: bool = False
    parallel_single_norm: bool = False
    key_bias_absent: bool = False
    query_gate: bool = False
    sinks: bool = False
    window_all: bool = False
    ffn_multiple: int = 0
    chosen: int = 1
    activation: str = "silu"


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", ffn_bias="mlp_bias")
_BERT = Family(
    kind="encoder", gated=False, norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, tied=True,
    final_norm=False, embedding_norm=True, learned_positions=True,
)  # fmt: skip
_BART = Family(
    kind="encoder_decoder", gated=False, norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, tied=True,
    final_norm=False, embedding_norm=True, learned_positions=True, position_offset=2,
)  # fmt: skip
_VIT = Family(kind="vision", gated=False, norm="layer", qkv_bias="qkv_bias", out_bias=True, ffn_bias=True)
_T5 = Family(kind="encoder_decoder", gated="is_gated_act", tied=True, activation="relu")
_QWEN3 = Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head")

FAMILIES: Mapping[str, Family] = {
    "bart": _BART,
    "bert": _BERT,
    "bloom": Family(
        gated=False, norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, tied=True, embedding_norm=True,
        ffn_multiple=4,
    ),
    "deepseek_v2": Family(latent=True, sparse=True, chosen=8),
    "deepseek_v3": Family(latent=True, sparse=True, chosen=8),
    "falcon": Family(
        gated=False, norm="layer", qkv_bias="bias", out_bias="bias", ffn_bias="bias", tied=True, multi_query=True,
        parallel_single_norm=True, ffn_multiple=4,
    ),
    "gemma": Family(qkv_bias="attention_bias", out_bias="attention_bias", tied=True),
    "gemma2": Family(qkv_bias="attention_bias", out_bias="attention_bias", tied=True, norms=4),
    "gemma3_text": Family(
        qkv_bias="attention_bias", out_bias="attention_bias", tied=True, norms=4, qk_norm="head"
    ),
    "gpt2": Family(
        gated=False, norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, tied=True, learned_positions=True,
        ffn_multiple=4, activation="gelu_new",
    ),
    "gpt_neox": Family(gated=False, norm="layer", qkv_bias="attention_bias", out_bias="attention_bias", ffn_bias=True),
    "gpt_oss": Family(qkv_bias=True, out_bias=True, ffn_bias=True, sparse=True, router_bias=True, sinks=True, chosen=4),
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": Family(window_all=True),
    "mixtral": Family(sparse=True, window_all=True, chosen=2),
    "mt5": _T5,
    "olmo2": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="full"),
    "olmoe": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="full", sparse=True, chosen=8),
    "opt": Family(
        gated=False, norm="layer", qkv_bias="enable_bias", out_bias="enable_bias", ffn_bias="enable_bias", tied=True,
        learned_positions=True, position_offset=2,
    ),
    "phi": Family(
        gated=False, norm="layer", qkv_bias=True, out_bias=True, ffn_bias=True, norms=1, head_bias=True,
    ),
    "phi3": Family(window_all=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias="qkv_bias", sparse=True, shared_gate=True, chosen=4),
    "qwen3": _QWEN3,
    "qwen3_moe": Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head", sparse=True, chosen=8),
    "roberta": _BERT,
    "smollm3": _LLAMA,
    "stablelm": Family(norm="layer", qkv_bias="use_qkv_bias"),
    "starcoder2": Family(
        gated=False, norm="layer", qkv_bias="use_bias", out_bias="use_bias", ffn_bias="use_bias", tied=True,
        window_all=True,
    ),
    "t5": _T5,
    "vit": _VIT,
}  # fmt: skip


def guess(config: Mapping[str, Any]) -> Family:
    """A family for a `model_type` not in the table: Llama's block, with experts and latents where keys say so."""
    if config.get("patch_size") and config.get("image_size"):
        return _VIT
    if config.get("is_encoder_decoder"):
        return _T5 if "d_kv" in config else _BART
    sparse = any(config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    return Family(
        qkv_bias="attention_bias", out_bias="attention_bias", ffn_bias="mlp_bias", sparse=sparse,
        latent=config.get("kv_lora_rank") is not None,
        tied=bool(config.get("tie_word_embeddings", False)),
    )  # fmt: skip
