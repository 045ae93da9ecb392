"""Which model: the part of a recipe that names a preset or a transformers configuration, and adapters on top."""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import Field, model_validator

from modelyard.models.presets import PRESETS, derived, parameters_of
from modelyard.recipe.schema import Options

OVERRIDES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "vocab_size",
    "tie_word_embeddings",
)


NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Bits a parameter of a matrix in NormalFloat with double quantization (`models.nf4`)."""


class ModelOptions(Options):
    """A model to be built, with overrides: `preset`, `size`, or `config` (a transformers configuration)."""

    preset: str | None = Field(None, description=f"named shape: {', '.join(PRESETS)}")
    size: str | None = Field(
        None, description="parameters of the blocks, as 30m or 1.2b; width, depth and heads follow; instead of a preset"
    )
    config: dict[str, Any] | None = Field(
        None, description="transformers configuration, `model_type` included; instead of a preset"
    )
    hidden_size: int | None = Field(None, gt=0, description="width of the residual stream; null = the preset's")
    intermediate_size: int | None = Field(None, gt=0, description="feed-forward width; null = the preset's")
    num_hidden_layers: int | None = Field(None, gt=0, description="decoder blocks; null = the preset's")
    num_attention_heads: int | None = Field(None, gt=0, description="query heads; null = the preset's")
    num_key_value_heads: int | None = Field(None, gt=0, description="key-value heads; null = the preset's")
    max_position_embeddings: int | None = Field(
        None, gt=0, description="longest sequence in tokens; null = the preset's"
    )
    vocab_size: int | None = Field(None, gt=0, description="rows of the embedding; null = the tokenizer's vocabulary")
    tie_word_embeddings: bool | None = Field(
        None, description="whether input and output embedding are one matrix; null = the preset's"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelOptions:
        if sum(value is not None for value in (self.preset, self.size, self.config)) != 1:
            raise ValueError("give either preset or config, or a size")
        if self.size is not None:
            parameters_of(self.size)
        if self.preset is not None and self.preset not in PRESETS:
            near = difflib.get_close_matches(self.preset, PRESETS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"no preset {self.preset!r}{hint} (presets: {', '.join(PRESETS)})")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config needs model_type, the name of a transformers architecture (llama, qwen3, gpt2...)")
        return self

    def settings(self) -> dict[str, Any]:
        """Preset or config with the overrides applied; `vocab_size` stays out unless it was asked for."""
        if self.config is None:
            shape = PRESETS[self.preset] if self.preset is not None else derived(str(self.size))
            base = shape.config()
            base.pop("vocab_size")
        else:
            base = dict(self.config or {})
        overrides = {name: getattr(self, name) for name in OVERRIDES}
        return base | {name: value for name, value in overrides.items() if value is not None}


class LoraOptions(Options):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on linear layers."""

    r: int = Field(8, gt=0, description="rank of the update (default of the paper's GPT-2 experiments: 4; PEFT: 8)")
    alpha: float = Field(16.0, gt=0, description="scale of the update is alpha / r (twice the rank, common practice)")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapter")
    targets: tuple[str, ...] | Literal["all-linear"] = Field(
        "all-linear", description="names of the linear layers that get an adapter (QLoRA: all)"
    )
    dora: bool = Field(
        False, description="learn the length of every row of the weight apart from its direction (arXiv 2402.09353)"
    )
    rank_stabilized: bool = Field(
        False, description="scale the update by alpha / sqrt(r), so that high ranks learn too (arXiv 2312.03732)"
    )
    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: the frozen matrices of the blocks in 4.13 bits a parameter while training (QLoRA, arXiv "
        "2305.14314); the merged model is of full precision. null = as they are",
    )


class Ia3Options(Options):
    """Learned factors on keys, values and the feed-forward layer (Liu et al. 2022, arXiv 2205.05638)."""

    targets: tuple[str, ...] = Field(
        ("k_proj", "v_proj", "down_proj"), min_length=1, description="layers whose results are scaled (T-Few: these)"
    )
    feedforward: tuple[str, ...] = Field(
        ("down_proj",), description="those of the targets whose inputs are scaled instead"
    )


class PromptOptions(Options):
    """Learned vectors before every text, for supervised fine-tuning; the model's weights stay as they are."""

    kind: Literal["prompt", "prefix", "p_tuning"] = Field(
        "prefix",
        description="prompt: vectors before the embeddings (arXiv 2104.08691); p_tuning: the same by a small network "
        "(arXiv 2103.10385); prefix: keys and values of every layer (P-tuning v2, arXiv 2110.07602)",
    )
    tokens: int = Field(20, ge=1, description="vectors, each of which takes a position of the model (paper: 1 to 150)")
    hidden: int = Field(128, ge=1, description="width of p_tuning's network")


class AdapterOptions(Options):
    """How fine-tuning changes the model; `lora: null` alone trains every parameter."""

    lora: LoraOptions | None = Field(
        LoraOptions(), description="low-rank adapters; null = full fine-tuning, or another adapter"
    )
    ia3: Ia3Options | None = Field(None, description="learned factors instead of low-rank adapters")
    prompt: PromptOptions | None = Field(
        None, description="learned vectors before every text instead; they leave an adapter and no merged model"
    )

    @model_validator(mode="before")
    @classmethod
    def _another(cls, value: Any) -> Any:
        """Asking for another adapter is not asking for the default one too."""
        another = isinstance(value, dict) and any(value.get(name) is not None for name in ("ia3", "prompt"))
        if another and "lora" not in value:
            return {**value, "lora": None}
        return value

    @model_validator(mode="after")
    def _one(self) -> AdapterOptions:
        if sum(each is not None for each in (self.lora, self.ia3, self.prompt)) > 1:
            raise ValueError("give one of lora, ia3 and prompt")
        return self

    @property
    def full(self) -> bool:
        """Whether every parameter is trained."""
        return self.lora is None and self.ia3 is None and self.prompt is None

    @property
    def frozen_bits(self) -> float | None:
        """Bits a parameter of the blocks' matrices while training, where these are quantized."""
        return NF4_BITS if self.lora is not None and self.lora.quantize == "nf4" else None
