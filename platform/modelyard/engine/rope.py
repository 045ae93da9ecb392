"""Rotary position embedding: inverse frequencies of the scaling variants checkpoints use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from modelyard.errors import DataError

VARIANTS = ("default", "linear", "llama3", "yarn")


def rotations(parameters: Mapping[str, Any], head_dim: int, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines that rotate the halves of queries and keys (RoFormer, arXiv:2104.09864).

    Args:
        parameters: `rope_parameters` of a Hugging Face config.
        head_dim: channels of an attention head.
        length: positions to cover.

    Returns:
        float32 [length, head_dim / 2] each, scaled by the variant's attention factor.

    Raises:
        DataError: a variant this engine does not know.
    """
    variant = parameters.get("rope_type", "default")
    if variant not in VARIANTS:
        raise DataError(
            f"RoPE variant {variant!r} is not supported", place="config.json", mend=f"known: {', '.join(VARIANTS)}"
        )
    base = float(parameters["rope_theta"])
    frequencies = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))
    scale = 1.0
    if variant == "linear":
        frequencies = frequencies / float(parameters["factor"])
    elif variant == "llama3":
        frequencies = _llama3(frequencies, parameters)
    elif variant == "yarn":
        frequencies, scale = _yarn(frequencies, parameters, base, head_dim)
    angles = torch.arange(length).float()[:, None] * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _llama3(frequencies: Tensor, p: Mapping[str, Any]) -> Tensor:
    """Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly in frequency."""
    old_length = float(p["original_max_position_embeddings"])
    low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
    turns = old_length * frequencies / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return frequencies * blend + frequencies / float(p["factor"]) * (1 - blend)


def _yarn(frequencies: Tensor, p: Mapping[str, Any], base: float, head_dim: int) -> tuple[Tensor, float]:
    """YaRN, arXiv:2309.00071, sections 3.2 (blend by number of turns) and 3.4 (attention temperature)."""
    if "mscale" in p or "mscale_all_dim" in p:
        raise DataError("YaRN with mscale is not supported", place="config.json", mend="use a checkpoint without it")
    factor, old_length = float(p["factor"]), float(p["original_max_position_embeddings"])

    def channel(turns: float) -> float:
        return head_dim * math.log(old_length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = channel(float(p.get("beta_fast") or 32)), channel(float(p.get("beta_slow") or 1))
    if p.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    slowed = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    scale = p.get("attention_factor")
    temperature = float(scale) if scale is not None else 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return frequencies / factor * slowed + frequencies * (1 - slowed), temperature
