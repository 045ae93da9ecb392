"""The shape of a transformer, read from any Hugging Face config: what every other planner module counts with.

A config is a mapping (the `config.json`, or `config.to_dict()`). Families differ in little: whether the
FFN has a gate, which projections carry a bias, how many norms a layer has. `families.py` is that table;
this module turns a config and a row of the table into an `Architecture`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.errors import RecipeError
from modelyard.planner.families import FAMILIES, Family, guess

_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "vocab": ("vocab_size",),
    "kv_heads": ("num_key_value_heads", "num_kv_heads"),
    "head_dim": ("head_dim", "d_kv"),
    "positions": ("max_position_embeddings", "n_positions"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts"),
    "chosen": ("num_experts_per_tok", "moe_topk"),
    "expert_width": ("moe_intermediate_size",),
    "window": ("sliding_window",),
    "activation": ("hidden_act", "hidden_activation", "activation_function", "dense_act_fn"),
}


def read(config: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of a quantity under whichever of its names the config uses; None counts as absent."""
    for key in _ALIASES.get(name, (name,)):
        if config.get(key) is not None:
            return config[key]
    return default


def require(config: Mapping[str, Any], name: str) -> int:
    """Like `read` for a positive integer that must be there.

    Raises:
        RecipeError: absent, not an integer or not positive; names the keys that would be accepted.
    """
    value = read(config, name)
    keys = " or ".join(_ALIASES.get(name, (name,))[:3])
    if value is None:
        raise RecipeError(f"the model's config lacks {keys}", place="config", mend=f"add {keys} to the config")
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise RecipeError(f"{keys} is {value!r}", place="config", mend="give a whole number above zero")
    return value


@dataclass(frozen=True)
class Layer:
    """`count` equal layers: parameters of each part of one layer, and the shapes that FLOPs and memory need.

    `attention`, `cross`, `ffn`, `router` and `norm` are parameters including biases; `ffn_active` is the
    part a single token passes through. `ffn_width` is the width of one expert (or of the dense FFN),
    `matrices` 3 with a gate and 2 without. `query_width` is heads x head size.
    """

    count: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    attention: int
    cross: int
    ffn: int
    ffn_active: int
    router: int
    norm: int
    ffn_width: int
    shared_width: int
    matrices: int
    experts: int
    experts_active: int
    window: int | None
    causal: bool
    layer_norm: bool
    qk_norm: bool
    activation: str
    latent: int
    """Cached values a token under multi-head latent attention; 0 = plain keys and values are cached."""

    @property
    def parameters(self) -> int:
        """Parameters of one layer."""
        return self.attention + self.cross + self.ffn + self.router + self.norm

    @property
    def active(self) -> int:
        """Parameters of one layer that one token uses."""
        return self.attention + self.cross + self.ffn_active + self.router + self.norm

    @property
    def kv_values(self) -> int:
        """Numbers the KV cache holds for one token and one layer."""
        return self.latent or self.kv_heads * (self.head_dim + self.value_dim)

    @property
    def active_width(self) -> int:
        """FFN width one token passes through: all its experts and the shared one side by side."""
        return self.ffn_width * self.experts_active + self.shared_width


@dataclass(frozen=True)
class Architecture:
    """A model as the planner sees it. `exact` is false where the family is unknown and its shape was guessed."""

    model_type: str
    hidden: int
    vocab: int
    layers: tuple[Layer, ...]
    embedding: int
    positions: int
    other: int
    head: int
    tied: bool
    encoder: tuple[Layer, ...] = ()
    patches: int = 0
    exact: bool = True

    def stack(self) -> Iterator[Layer]:
        """Every group of layers, encoder first."""
        yield from self.encoder
        yield from self.layers

    @property
    def layer_norm(self) -> bool:
        """Whether norms are LayerNorms (one fused operation) rather than RMS norms (written out)."""
        return self.layers[0].layer_norm

    @property
    def depth(self) -> int:
        """Number of layers, encoder and decoder together."""
        return sum(layer.count for layer in self.stack())


def parse(config: Mapping[str, Any]) -> Architecture:
    """Reads a config into an `Architecture`.

    A multimodal config is read by its `text_config`: the language model only.

    Raises:
        RecipeError: a needed key is missing or not a positive whole number.
    """
    if isinstance(config.get("text_config"), Mapping) and read(config, "hidden") is None:
        config = config["text_config"]
    family = FAMILIES.get(str(config.get("model_type", "")))
    exact = family is not None
    family = family or guess(config)
    if family.kind == "vision":
        return _vision(config, family)
    if family.kind == "encoder_decoder":
        return _encoder_decoder(config, family, exact)
    return _decoder(config, family, exact)


def _flag(config: Mapping[str, Any], rule: bool | str) -> bool:
    """A trait is either fixed for the family or named by a config key (`key`, or `!key` for its opposite)."""
    if isinstance(rule, bool):
        return rule
    return not config.get(rule[1:], False) if rule.startswith("!") else bool(config.get(rule, False))


def _attention(config: Mapping[str, Any], family: Family, hidden: int, heads: int) -> dict[str, int]:
    """Shapes and parameters of one attention block."""
    if family.latent:
        return _latent_attention(config, hidden, heads)
    kv_heads = int(read(config, "kv_heads", heads))
    if family.multi_query:
        new = config.get("new_decoder_architecture", False)
        kv_heads = int(read(config, "kv_heads", heads)) if new or not config.get("multi_query", True) else 1
    head_dim = int(read(config, "head_dim", hidden // heads if hidden % heads == 0 else 0))
    if head_dim == 0:
        near = hidden - hidden % heads or heads
        raise RecipeError(
            f"hidden size {hidden} is not divisible by {heads} heads",
            place="config",
            mend=f"use a hidden size of {near} or {near + heads}, or state head_dim",
        )
    q, kv = heads * head_dim, kv_heads * head_dim
    total = hidden * (q + 2 * kv) + q * hidden
    total += (q + 2 * kv) * _flag(config, family.qkv_bias) + hidden * _flag(config, family.out_bias)
    if family.key_bias_absent:
        total -= kv
    if family.query_gate:
        total += hidden * q
    if _flag(config, family.qk_norm != ""):
        total += {"head": 2 * head_dim, "full": q + kv, "heads": q + kv}.get(family.qk_norm, 0)
    if family.sinks:
        total += heads
    return {"kv_heads": kv_heads, "head_dim": head_dim, "value_dim": head_dim, "attention": total, "latent": 0}


def _latent_attention(config: Mapping[str, Any], hidden: int, heads: int) -> dict[str, int]:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): low-rank queries and cached latents."""
    rope, nope = require(config, "qk_rope_head_dim"), require(config, "qk_nope_head_dim")
    value, rank = require(config, "v_head_dim"), require(config, "kv_lora_rank")
    query, bias = config.get("q_lora_rank"), bool(config.get("attention_bias", False))
    width = heads * (rope + nope)
    total = hidden * width if query is None else hidden * query + query * bias + query + query * width
    total += hidden * (rank + rope) + (rank + rope) * bias + rank
    total += rank * heads * (nope + value) + heads * value * hidden + hidden * bias
    return {
        "kv_heads": heads, "head_dim": rope + nope, "value_dim": value, "attention": total, "latent": rank + rope,
    }  # fmt: skip


def _mlp(hidden: int, width: int, matrices: int, bias: bool) -> int:
    """Parameters of one FFN of `width`: `matrices` products, and a bias after each where the family has them."""
    return matrices * hidden * width + ((matrices - 1) * width + hidden) * bias


def _ffn(config: Mapping[str, Any], family: Family, hidden: int, sparse: bool) -> dict[str, int]:
    """Shapes and parameters of one FFN, dense or a mixture of experts."""
    gated = _flag(config, family.gated)
    matrices, bias = (3 if gated else 2), _flag(config, family.ffn_bias)
    width = int(read(config, "ffn", 0) or family.ffn_multiple * hidden)
    if not width:
        width = require(config, "ffn")
    if not sparse:
        dense = _mlp(hidden, width, matrices, bias)
        return {
            "ffn": dense, "ffn_active": dense, "router": 0, "ffn_width": width, "shared_width": 0,
            "matrices": matrices, "experts": 1, "experts_active": 1,
        }  # fmt: skip
    experts = require(config, "experts")
    chosen = min(int(read(config, "chosen", family.chosen)), experts)
    width = int(read(config, "expert_width", width))
    shared = _shared_width(config, width)
    expert, common = _mlp(hidden, width, matrices, bias), _mlp(hidden, shared, matrices, bias) if shared else 0
    router = hidden * experts + experts * family.router_bias + hidden * (family.shared_gate and shared > 0)
    return {
        "ffn": experts * expert + common, "ffn_active": chosen * expert + common, "router": router,
        "ffn_width": width, "shared_width": shared, "matrices": matrices, "experts": experts, "experts_active": chosen,
    }  # fmt: skip


def _shared_width(config: Mapping[str, Any], width: int) -> int:
    """Width of the expert every token passes through; 0 where there is none."""
    if config.get("shared_expert_intermediate_size"):
        return int(config["shared_expert_intermediate_size"])
    return width * int(config.get("n_shared_experts") or 0)


def _norm(config: Mapping[str, Any], family: Family, hidden: int) -> int:
    """Parameters of one norm over `hidden` values."""
    return hidden * {"rms": 1, "layer": 2, "scale": 1, "none": 0}[family.norm]


def _layer(
    config: Mapping[str, Any], family: Family, count: int, *, sparse: bool, window: int | None,
    heads: int | None = None, ffn: int | None = None, causal: bool = True, cross: bool = False,
) -> Layer:  # fmt: skip
    hidden, heads = require(config, "hidden"), heads or require(config, "heads")
    attention = _attention(config, family, hidden, heads)
    shapes = _ffn(config if ffn is None else {**config, "intermediate_size": ffn}, family, hidden, sparse)
    norms = family.norms - (family.parallel_single_norm and config.get("num_ln_in_parallel_attn", 0) != 2)
    return Layer(
        count=count, hidden=hidden, heads=heads, cross=attention["attention"] * cross,
        norm=_norm(config, family, hidden) * (norms + cross), window=window, causal=causal,
        layer_norm=family.norm == "layer", qk_norm=family.qk_norm != "",
        activation=str(read(config, "activation", family.activation)), **attention, **shapes,
    )  # fmt: skip


def _groups(config: Mapping[str, Any], family: Family, depth: int) -> list[tuple[int, bool, int | None]]:
    """Runs of equal layers as (count, sparse, window), from the config's per-layer rules."""
    experts = int(read(config, "experts", 0))
    first = int(config.get("first_k_dense_replace") or 0)
    step = int(config.get("decoder_sparse_step") or 1)
    only_dense = set(config.get("mlp_only_layers") or ())
    kinds = config.get("layer_types") or ()
    width = read(config, "window") if config.get("use_sliding_window", True) else None
    tally: dict[tuple[bool, int | None], int] = {}
    for i in range(depth):
        sparse = family.sparse and experts > 0 and i >= first and i not in only_dense and (i + 1) % step == 0
        local = width is not None and (kinds[i] == "sliding_attention" if i < len(kinds) else family.window_all)
        tally[(sparse, width if local else None)] = tally.get((sparse, width if local else None), 0) + 1
    return [(count, sparse, window) for (sparse, window), count in tally.items()]


def _decoder(config: Mapping[str, Any], family: Family, exact: bool) -> Architecture:
    """A single stack: decoder-only models, and encoders such as BERT."""
    hidden, vocab, depth = require(config, "hidden"), require(config, "vocab"), require(config, "layers")
    causal = family.kind == "decoder"
    layers = tuple(
        _layer(config, family, count, sparse=sparse, window=window, causal=causal)
        for count, sparse, window in _groups(config, family, depth)
    )
    tied = bool(config.get("tie_word_embeddings", family.tied))
    width = int(config.get("word_embed_proj_dim") or hidden)
    other = _norm(config, family, hidden) * (family.final_norm + family.embedding_norm)
    other += 2 * hidden * width * (width != hidden)
    if family.kind == "encoder":
        # The masked-language-model head: dense, activation, norm and the vocabulary's bias.
        other += int(config.get("type_vocab_size", 0)) * hidden + hidden * hidden + hidden + 2 * hidden + vocab
    return Architecture(
        model_type=str(config.get("model_type", "unknown")), hidden=hidden, vocab=vocab, layers=layers,
        embedding=vocab * width, positions=_positions(config, family, hidden), other=other + vocab * family.head_bias,
        head=0 if tied else vocab * width, tied=tied, exact=exact,
    )  # fmt: skip


def _positions(config: Mapping[str, Any], family: Family, hidden: int) -> int:
    """Learned position embeddings, one table."""
    return (require(config, "positions") + family.position_offset) * hidden if family.learned_positions else 0


def _encoder_decoder(config: Mapping[str, Any], family: Family, exact: bool) -> Architecture:
    """T5 and BART: an encoder that sees everything, a decoder with cross-attention."""
    hidden, vocab, depth = require(config, "hidden"), require(config, "vocab"), require(config, "layers")
    decoders = int(config.get("num_decoder_layers") or config.get("decoder_layers") or depth)
    encoder = _layer(config, family, depth, sparse=False, window=None, causal=False)
    decoder = _layer(
        config, family, decoders, sparse=False, window=None, cross=True,
        heads=config.get("decoder_attention_heads"), ffn=config.get("decoder_ffn_dim"),
    )  # fmt: skip
    tied = bool(config.get("tie_word_embeddings", family.tied))
    # Relative positions (T5): one table of buckets x heads in each stack's first layer.
    relative = int(config.get("relative_attention_num_buckets") or 0) * encoder.heads * 2
    norms = _norm(config, family, hidden) * 2 * (family.final_norm + family.embedding_norm)
    return Architecture(
        model_type=str(config.get("model_type", "unknown")), hidden=hidden, vocab=vocab, encoder=(encoder,),
        layers=(decoder,), embedding=vocab * hidden, positions=2 * _positions(config, family, hidden) + relative,
        other=norms, head=0 if tied else vocab * hidden, tied=tied, exact=exact,
    )  # fmt: skip


def _vision(config: Mapping[str, Any], family: Family) -> Architecture:
    """A vision transformer: patch projection, class token, positions, blocks, and a classifier where labels are."""
    hidden, patch, side = require(config, "hidden"), require(config, "patch_size"), require(config, "image_size")
    patches = (side // patch) ** 2
    layer = _layer(config, family, require(config, "layers"), sparse=False, window=None, causal=False)
    labels = len(config.get("id2label") or ()) or int(config.get("num_labels") or 0)
    projection = patch * patch * int(config.get("num_channels", 3)) * hidden + hidden
    return Architecture(
        model_type=str(config.get("model_type", "vit")), hidden=hidden, vocab=labels, layers=(layer,), patches=patches,
        embedding=projection, positions=(patches + 1) * hidden, other=hidden + _norm(config, family, hidden),
        head=labels * (hidden + 1), tied=False,
    )  # fmt: skip
