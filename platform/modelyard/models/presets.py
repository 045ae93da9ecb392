"""Named model shapes, from a toy for two CPU cores to 70 B. Numbers only: reading this imports no torch."""

from __future__ import annotations

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
}
