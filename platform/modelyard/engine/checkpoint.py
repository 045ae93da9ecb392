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
}
_UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".py", ".so")


@dataclass(frozen=True)
class DecoderConfig:
    """The numbers that shape a decoder-only transformer of the Llama family.

    `window` is the sliding-window width in tokens, None for full attention.
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
    rope: Mapping[str, Any]
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied: bool
    window: int | None
    end_tokens: tuple[int, ...]

    def length(self, wanted: int | None) -> int:
        """Tokens a prompt and its answer may have together when `wanted` are asked for.

        A model with a sliding window is bounded to one window, inside which the window makes no difference.
        """
        return min(self.positions, wanted or self.positions, self.window or self.positions)

    @property
    def cache_bytes_per_token(self) -> int:
        """Bytes of float32 keys and values one token keeps."""
        return 2 * 4 * self.layers * self.kv_heads * self.head_dim


def check_folder(folder: Path) -> None:
    """Raises DataError when `folder` is no Hugging Face model folder, or holds what could execute."""
    if not (folder / "config.json").is_file():
        raise DataError(
            "this is not a model folder: it has no config.json",
            place=str(folder),
            mend="give a Hugging Face folder with config.json, *.safetensors and tokenizer.json",
        )
    for file in sorted(folder.iterdir()):
        if file.suffix in _UNSAFE:
            raise DataError(
                f"{file.name} could execute code when loaded; only safetensors are read",
                place=str(file),
                mend="convert the weights to safetensors and remove the file",
            )
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in read_json(folder / name, missing={}):
            raise DataError(
                f"{name} asks for remote code (auto_map)",
                place=str(folder / name),
                mend="use a checkpoint of a supported architecture: " + ", ".join(FAMILIES),
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
    if raw.get("hidden_act", "silu") != "silu":
        raise DataError(f"activation {raw['hidden_act']!r} is not supported", place=place, mend="use a silu model")
    if raw.get("quantization_config"):
        raise DataError("quantized checkpoints are not supported", place=place, mend="use the unquantized weights")
    try:
        return _decoder_config(raw, family, _end_tokens(folder, raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"config.json lacks or garbles {error}", place=place, mend="restore the file") from error


def _decoder_config(raw: dict[str, Any], family: str, end_tokens: tuple[int, ...]) -> DecoderConfig:
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    bias = bool(raw.get("attention_bias", False))
    return DecoderConfig(
        family=family,
        vocabulary=int(raw["vocab_size"]),
        hidden=hidden,
        intermediate=int(raw["intermediate_size"]),
        layers=int(raw["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or hidden // heads),
        positions=int(raw["max_position_embeddings"]),
        norm_epsilon=float(raw.get("rms_norm_eps", 1e-6)),
        rope=_rope(raw),
        qkv_bias=family == "qwen2" or bias,
        out_bias=family != "qwen2" and bias,
        mlp_bias=bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        tied=bool(raw.get("tie_word_embeddings", False)),
        window=_window(raw, family),
        end_tokens=end_tokens,
    )


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    """Both spellings: `rope_parameters` of transformers 5, `rope_theta` with `rope_scaling` before it."""
    if raw.get("rope_parameters"):
        return {"rope_theta": 10000.0} | dict(raw["rope_parameters"])
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    return {"rope_theta": raw.get("rope_theta", 10000.0), "rope_type": kind} | scaling


def _window(raw: dict[str, Any], family: str) -> int | None:
    if family.startswith("qwen") and not raw.get("use_sliding_window", False):
        return None
    if family == "llama" or raw.get("sliding_window") is None:
        return None
    return int(raw["sliding_window"])


def _end_tokens(folder: Path, raw: dict[str, Any]) -> tuple[int, ...]:
    generation = read_json(folder / "generation_config.json", missing={})
    found = generation.get("eos_token_id", raw.get("eos_token_id"))
    if found is None:
        return ()
    return tuple(int(t) for t in found) if isinstance(found, list) else (int(found),)


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of every safetensors file, by its Hugging Face name; memory-mapped, one at a time.

    Raises DataError when there is no safetensors file or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
    if not files:
        raise DataError(
            "the folder has no *.safetensors", place=str(folder), mend="save the model with safe_serialization"
        )
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    yield name, handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"cannot read {file.name}: {error}", place=str(file), mend="restore or download it again"
            ) from error
