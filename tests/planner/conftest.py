"""Configs the planner's tests share."""

from __future__ import annotations

from typing import Any

import pytest

_LLAMA_70B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def llama_70b() -> dict[str, Any]:
    return dict(_LLAMA_70B)


@pytest.fixture
def llama_8b() -> dict[str, Any]:
    return {**_LLAMA_70B, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
            "intermediate_size": 14336}  # fmt: skip


@pytest.fixture
def mixtral() -> dict[str, Any]:
    return {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 32000, "num_local_experts": 8,
        "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip


@pytest.fixture
def tiny() -> dict[str, Any]:
    return {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 704, "vocab_size": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
