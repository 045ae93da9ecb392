"""Named model shapes, from a toy for two CPU cores to 70 B, and shapes derived from a size alone.

Numbers only: reading this imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The numbers of one decoder-only Llama.

    `vocab_size` is what the published model used; the tokens a model is trained on replace it. A head holds
    `hidden_size // num_attention_heads` channels.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float = 10_000.0

    def config(self) -> dict[str, Any]:
        """The same as keyword arguments of a transformers `LlamaConfig`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "rope_theta"}
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {"model_type": "llama", "rope_parameters": rope, "initializer_range": 0.02, **values}


@dataclass(frozen=True)
class MixtureShape(Shape):
    """The numbers of a decoder whose feed-forwards are `experts`, of which every token uses `chosen`.

    `intermediate_size` is the width of one expert.
    """

    experts: int = 8
    chosen: int = 2

    def config(self) -> dict[str, Any]:
        """As keyword arguments of a transformers `MixtralConfig`: dropless top-k routing over softmax."""
        values = super().config()
        experts, chosen = values.pop("experts"), values.pop("chosen")
        routing = {"num_local_experts": experts, "num_experts_per_tok": chosen, "sliding_window": None}
        return {**values, "model_type": "mixtral", **routing}


_SIZE = re.compile(r"^\s*([0-9]*\.?[0-9]+)\s*([mb])\s*$", re.IGNORECASE)
HEAD = 64
"""Channels of a head, as in Llama 3.2 1B and GPT-3's small models."""


def parameters_of(size: str) -> float:
    """`30m` or `1.2b` as a number of parameters.

    Raises:
        ValueError: it is not written so, or is below a million.
    """
    match = _SIZE.match(size)
    if match is None:
        raise ValueError(f"{size!r} is not a model size: write 30m or 1.2b")
    number = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2].lower()]
    if number < 1e6:
        raise ValueError(f"a model of {size} is smaller than 1m, the smallest that is derived")
    return number


def derived(size: str) -> Shape:
    """The Llama whose blocks hold about `size` parameters (embeddings come on top), by one dial.

    Width and depth grow together at about 64 to 128 channels a layer, the ratio of the published Llamas and of
    Kaplan et al. 2020 (arXiv 2001.08361, flat between 50 and 200); feed-forward width is 8/3 of the width; four query
    heads share a key-value head from 1024 channels on.

    Raises:
        ValueError: see :func:`parameters_of`.
    """
    wanted = parameters_of(size)
    return min((_at_width(width, wanted) for width in range(HEAD, 32 * 1024, HEAD)), key=lambda s: _misfit(s, wanted))


def _at_width(width: int, wanted: float) -> Shape:
    heads = width // HEAD
    shared = heads // 4 if width >= 1024 and heads % 4 == 0 else heads
    feed_forward = -(-8 * width // 3 // 64) * 64
    depth = max(2, round(wanted / _block(width, heads, shared, feed_forward)))
    return Shape(width, feed_forward, depth, heads, shared, 32_000, 4096 if width >= 1024 else 2048, width < 4096)


def _block(width: int, heads: int, shared: int, feed_forward: int) -> int:
    return width * HEAD * 2 * (heads + shared) + 3 * width * feed_forward + 2 * width


def _misfit(shape: Shape, wanted: float) -> float:
    """How far a shape is from its size and from a good ratio of width to depth, as a sum of squared logarithms."""
    held = shape.num_hidden_layers * _block(
        shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.intermediate_size
    )
    good = 128 if shape.hidden_size >= 2048 else 64
    ratio = shape.hidden_size / shape.num_hidden_layers / good
    return 25 * math.log(held / wanted) ** 2 + math.log(ratio) ** 2


def learning_rate(parameters: float) -> float:
    """A peak rate for AdamW at this size: 1e-3 at 30 M, falling with the fifth root to 3e-4 at 12 B or so.

    Between the rates of GPT-3 (6e-4 at 125 M to 0.6e-4 at 175 B) and those of small models (3e-3 at 1 M).
    """
    return float(f"{min(3e-3, 1e-3 * (parameters / 3e7) ** -0.2):.2g}")


# Parameters in the comments are counted with the vocabulary given here.
PRESETS: dict[str, Shape] = {
    "llama-2m": Shape(128, 384, 4, 4, 2, 8192, 2048, True),  # 1.8 M
    "llama-4m": Shape(256, 704, 3, 4, 2, 8192, 2048, True),  # 4.3 M
    "llama-8m": Shape(256, 704, 8, 4, 2, 8192, 2048, True),  # 8.0 M
    "llama-15m": Shape(320, 896, 10, 5, 5, 8192, 2048, True),  # 15.3 M
    "llama-30m": Shape(512, 1408, 8, 8, 4, 16_384, 2048, True),  # 32 M
    "llama-60m": Shape(640, 1728, 10, 10, 5, 32_000, 2048, True),  # 66 M
    "llama-125m": Shape(768, 2048, 12, 12, 12, 32_000, 2048, True),  # 110 M
    "llama-350m": Shape(1024, 2816, 24, 16, 8, 32_000, 4096, True),  # 316 M
    "llama-1b": Shape(2048, 8192, 16, 32, 8, 128_256, 8192, True, 500_000.0),  # 1.24 B, Llama 3.2 1B
    "llama-3b": Shape(3072, 8192, 28, 24, 8, 128_256, 8192, True, 500_000.0),  # 3.2 B, Llama 3.2 3B
    "llama-7b": Shape(4096, 11_008, 32, 32, 32, 32_000, 4096, False),  # 6.7 B, Llama 2 7B
    "llama-8b": Shape(4096, 14_336, 32, 32, 8, 128_256, 8192, False, 500_000.0),  # 8.0 B, Llama 3 8B
    "llama-13b": Shape(5120, 13_824, 40, 40, 40, 32_000, 4096, False),  # 13.0 B, Llama 2 13B
    "llama-70b": Shape(8192, 28_672, 80, 64, 8, 128_256, 8192, False, 500_000.0),  # 70.6 B, Llama 3 70B
    "moe-9m": MixtureShape(256, 352, 3, 4, 2, 8192, 2048, True, experts=8, chosen=2),  # 9.2 M, 4.3 M a token
    "moe-65m": MixtureShape(512, 704, 6, 8, 4, 16_384, 2048, True, experts=8, chosen=2),  # 65 M, 26 M a token
    "moe-8x7b": MixtureShape(
        4096, 14_336, 32, 32, 8, 32_000, 32_768, False, 1_000_000.0, experts=8, chosen=2
    ),  # 46.7 B, 12.9 B a token, Mixtral 8x7B
}
