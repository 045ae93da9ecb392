"""What one engine replica may be told: sizes, budget and precision."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from modelyard.recipe.schema import Bytes, Options

Precision = Literal["float32", "float16_packed"]


class EngineOptions(Options):
    """Sizes, token budget and precision of a native engine."""

    max_sequences: int = Field(
        32, ge=1, le=1024, description="requests computed in one step; each owns a contiguous key/value slot"
    )
    max_length: int | None = Field(
        None, ge=2, description="tokens of prompt and answer together; null = the model's max_position_embeddings"
    )
    step_tokens: int = Field(
        256, ge=1, description="token budget of one step; long prompts are cut into chunks that fit (chunked prefill)"
    )
    max_waiting: int = Field(1024, ge=0, description="requests that may wait for a slot; more are refused")
    precision: Precision = Field(
        "float32",
        description="float32, or float16_packed: weights packed to half precision (half the memory, error 2e-4)",
    )
    threads: int | None = Field(None, ge=1, description="torch threads; null = the cores this process may use")
    cache_bytes: Bytes | None = Field(
        None, description="bound on the key/value cache in bytes; null = 60 % of the memory available at start"
    )
