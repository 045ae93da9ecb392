"""Model folders: Hugging Face `config.json` and safetensors, nothing that can execute.

A folder with pickles or remote code is refused by the name of the offending file before anything is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
    "MixtralForCausalLM": "mixtral",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "GPT2LMHeadModel": "gpt2",
}
_UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py", ".so")
_REFUSED_IN_ADAPTERS = {
    "use_dora": "DoRA",
    "modules_to_save": "fully trained modules",
    "trainable_token_indices": "token rows",
}


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the MLP: `used` of `count` experts a token, each `width` wide.

    `normalized`: the used experts' weights sum to one. `shared`: width of the expert every token uses, 0 = none.
    """

    count: int
    used: int
    width: int
    normalized: bool
    shared: int


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that shape a decoder-only transformer.

    `rope` is None for learned positions, `rotated` says which layers rotate. `windows` holds a layer's sliding
    window in tokens, 0 for full attention. `sparse` says which layers have `experts` in place of an MLP.
    """

    family: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    positions: int
    norm_epsilon: float
    rope: Mapping[str, Any] | None
    rotated: tuple[bool, ...]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    windows: tuple[int, ...]
    experts: Experts | None
    sparse: tuple[bool, ...]
    end_tokens: tuple[int, ...]

    def length(self, wanted: int | None) -> int:
        """Tokens a prompt and its answer may have together when `wanted` are asked for."""
        return min(self.positions, wanted or self.positions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values one token keeps."""
        return self.kept_bytes(4 * self.head_dim)

    def kept_bytes(self, head: int) -> int:
        """Bytes of keys and values one token keeps, where those of one head of one layer take `head`."""
        return 2 * self.layers * self.kv_heads * head


def check_folder(folder: Path) -> None:
    """Raises DataError when `folder` is no Hugging Face model folder, or holds what could execute."""
    if not (folder / "config.json").is_file():
        raise DataError(
            "this is not a model folder: it has no config.json",
            place=str(folder),
            mend="give a Hugging Face folder with config.json, *.safetensors and tokenizer.json",
        )
    check_unsafe(folder)
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_json(folder / name, missing={}):
            raise DataError(
                f"{name} asks for remote code (auto_map)",
                place=str(folder / name),
                mend="use a checkpoint of a supported architecture: " + ", ".join(FAMILIES),
            )


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a PEFT LoRA folder.

    Raises DataError for a folder that is none, holds what could execute, or has parts the engine does not apply.
    """
    file = folder / "adapter_config.json"
    if not file.is_file():
        raise DataError("this is not an adapter folder: it has no adapter_config.json", place=str(folder))
    check_unsafe(folder)
    config, place = read_json(file), str(file)
    if config.get("peft_type") != "LORA":
        raise DataError(f"adapter type {config.get('peft_type')!r} is not supported", place=place, mend="use LoRA")
    for key, meaning in _REFUSED_IN_ADAPTERS.items():
        if config.get(key):
            raise DataError(f"{meaning} ({key}) are not supported", place=place, mend="merge the adapter into its base")
    if config.get("bias", "none") != "none":
        raise DataError("adapters with biases are not supported", place=place, mend="merge the adapter into its base")
    return config


def check_unsafe(folder: Path) -> None:
    """Raises DataError naming the first file that could execute code when loaded."""
    for file in sorted(folder.iterdir()):
        if file.suffix in _UNSAFE:
            raise DataError(
                f"{file.name} could execute code when loaded; only safetensors are read",
                place=str(file),
                mend="convert the weights to safetensors and remove the file",
            )


def read_json(file: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    """A JSON object from a file; `missing` when the file is absent. Raises DataError when damaged."""
    if missing is not None and not file.exists():
        return missing
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file.name}: {error}", place=str(file), mend="restore the file") from error
    if not isinstance(value, dict):
        raise DataError(f"{file.name} is not a JSON object", place=str(file), mend="restore the file")
    return dict(value)


def read_config(folder: Path) -> DecoderConfig:
    """The decoder's shape from `config.json`. Raises DataError for an architecture the engine does not run."""
    raw = read_json(folder / "config.json")
    place = str(folder / "config.json")
    names = raw.get("architectures") or []
    family = next((FAMILIES[n] for n in names if n in FAMILIES), None)
    if family is None:
        raise DataError(
            f"architecture {', '.join(names) or '(none named)'} is not supported",
            place=place,
            mend="use one of " + ", ".join(FAMILIES),
        )
    activation = raw.get("activation_function", "gelu_new") if family == "gpt2" else raw.get("hidden_act", "silu")
    if activation not in (("gelu_new", "gelu_pytorch_tanh") if family == "gpt2" else ("silu",)):
        raise DataError(f"activation {activation!r} is not supported", place=place, mend="use a silu model")
    if raw.get("quantization_config"):
        raise DataError("quantized checkpoints are not supported", place=place, mend="use the unquantized weights")
    try:
        shape = _gpt2_config if family == "gpt2" else _llama_config
        return shape(raw, family, read_end_tokens(folder, raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"config.json lacks or garbles {error}", place=place, mend="restore the file") from error


def _llama_config(raw: dict[str, Any], family: str, end_tokens: tuple[int, ...]) -> DecoderConfig:
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    layers = int(raw["num_hidden_layers"])
    bias = bool(raw.get("attention_bias", False))
    qkv_bias = bool(raw.get("qkv_bias", True)) if family == "qwen2_moe" else family == "qwen2" or bias
    experts = _experts(raw, family)
    return DecoderConfig(
        family=family,
        vocabulary=int(raw["vocab_size"]),
        hidden=hidden,
        intermediate=int(raw["intermediate_size"]),
        layers=layers,
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        positions=int(raw["max_position_embeddings"]),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        rotated=tuple(bool(r) for r in raw.get("no_rope_layers") or [True] * layers),
        qkv_bias=qkv_bias,
        out_bias=family not in ("qwen2", "qwen2_moe") and bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family in ("qwen3", "qwen3_moe"),
        tied=bool(raw.get("tie_word_embeddings", False)),
        windows=_windows(raw, family, layers),
        experts=experts,
        sparse=_sparse(raw, layers) if experts else (False,) * layers,
        end_tokens=end_tokens,
    )


def _gpt2_config(raw: dict[str, Any], family: str, end_tokens: tuple[int, ...]) -> DecoderConfig:
    if raw.get("scale_attn_by_inverse_layer_idx") or not raw.get("scale_attn_weights", True):
        raise DataError("this scaling of attention is not supported", place="config.json", mend="use a plain GPT-2")
    hidden, layers, heads = int(raw["n_embd"]), int(raw["n_layer"]), int(raw["n_head"])
    return DecoderConfig(
        family=family,
        vocabulary=int(raw["vocab_size"]),
        hidden=hidden,
        intermediate=int(raw.get("n_inner") or 4 * hidden),
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        positions=int(raw["n_positions"]),
        norm_epsilon=float(raw.get("layer_norm_epsilon", 1e-5)),
        rope=None,
        rotated=(False,) * layers,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        qk_norm=False,
        tied=bool(raw.get("tie_word_embeddings", True)),
        windows=(0,) * layers,
        experts=None,
        sparse=(False,) * layers,
        end_tokens=end_tokens,
    )


def _experts(raw: dict[str, Any], family: str) -> Experts | None:
    if family == "mixtral":
        count, used = int(raw["num_local_experts"]), int(raw["num_experts_per_tok"])
        return Experts(count, used, int(raw["intermediate_size"]), normalized=True, shared=0)
    if family not in ("qwen2_moe", "qwen3_moe"):
        return None
    count = int(raw["num_experts"] if "num_experts" in raw else raw["num_local_experts"])
    shared = int(raw["shared_expert_intermediate_size"]) if family == "qwen2_moe" else 0
    normalized = bool(raw.get("norm_topk_prob", False))
    return Experts(count, int(raw["num_experts_per_tok"]), int(raw["moe_intermediate_size"]), normalized, shared)


def _sparse(raw: dict[str, Any], layers: int) -> tuple[bool, ...]:
    step, plain = int(raw.get("decoder_sparse_step", 1)), set(raw.get("mlp_only_layers") or [])
    return tuple(i not in plain and (i + 1) % step == 0 for i in range(layers))


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5, `rope_theta` with `rope_scaling` before it."""
    if float((raw.get("rope_parameters") or raw).get("partial_rotary_factor") or 1.0) != 1.0:
        raise DataError("partial rotation is not supported", place="config.json", mend="use another checkpoint")
    if raw.get("rope_parameters"):
        return {"rope_theta": 10000.0} | dict(raw["rope_parameters"])
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    return {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": kind} | scaling


def _windows(raw: dict[str, Any], family: str, layers: int) -> tuple[int, ...]:
    """Each layer's sliding window, 0 = full attention."""
    window = int(raw.get("sliding_window") or 0)
    if family in ("mistral", "mixtral"):
        return (window,) * layers
    if family == "llama" or not window or not raw.get("use_sliding_window", False):
        return (0,) * layers
    kinds = raw.get("layer_types")
    if kinds:
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
    return tuple(window if i >= int(raw.get("max_window_layers", 0)) else 0 for i in range(layers))


def read_end_tokens(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    """Token ids that end an answer of a model; `raw`: its config.json."""
    generation = read_json(folder / "generation_config.json", missing={})
    found = generation.get("eos_token_id", raw.get("eos_token_id"))
    if found is None:
        return ()
    return tuple(int(t) for t in found) if isinstance(found, list) else (int(found),)


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by its index where it has one. Raises DataError when there is none."""
    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    if not files:
        raise DataError(
            "the folder has no *.safetensors", place=str(folder), mend="save the model with safe_serialization"
        )
    return files


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of every safetensors file, by its Hugging Face name; memory-mapped, one at a time.

    Raises DataError when there is no safetensors file or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    for file in tensor_files(folder):
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"cannot read {file.name}: {error}", place=str(file), mend="restore or download it again"
            ) from error
