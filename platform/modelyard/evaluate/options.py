"""Options of an evaluation. Light: plans and schemas load it."""

from __future__ import annotations

from pydantic import Field

from modelyard.recipe.schema import Options


class PrivacyOptions(Options):
    """Whether the model gives back personal data that was scrubbed from its corpus."""

    values: int = Field(
        128, ge=0, description="original values to try to extract, at most; 0 = no extraction test; own choice"
    )
    context_tokens: int = Field(
        50,
        ge=1,
        description="tokens of scrubbed text before a value that the model is prompted with (Carlini et al. 2023)",
    )
    new_tokens: int = Field(50, ge=1, description="tokens generated greedily after a context (Carlini et al. 2023)")
    free_samples: int = Field(32, ge=0, description="texts sampled from nothing and scanned; own choice")
    free_tokens: int = Field(64, ge=1, description="tokens of each of them; own choice")


class EvaluationOptions(Options):
    """What is measured, and on how much."""

    max_sequences: int | None = Field(
        128, ge=1, description="held-out sequences, which lie in random order; null = all; own choice"
    )
    max_pairs: int | None = Field(64, ge=1, description="held-out pairs of a fine-tuned model; null = all; own choice")
    samples: int = Field(4, ge=0, description="continuations of held-out text shown in the report; own choice")
    sample_tokens: int = Field(48, ge=1, description="tokens of each of them; own choice")
    privacy: PrivacyOptions = Field(PrivacyOptions(), description="the test for memorized personal data")
    seed: int = Field(0, ge=0, description="of sampled text")
