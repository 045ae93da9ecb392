"""Options of what accompanies a run: spikes, early stopping, profiles, samples of text. Light."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from modelyard.recipe.schema import Options

_RANGE = re.compile(r"^(?:steps=)?(\d+)\.\.(\d+)$")


class SpikeOptions(Options):
    """What to do when the loss jumps: skip updates, then go back to a checkpoint and train on at a lower rate."""

    deviations: float = Field(
        8.0, gt=0, description="robust standard deviations above the recent median that make a spike"
    )
    window: int = Field(64, ge=8, description="accepted steps the median is taken over; half of them must be there")
    skips: int = Field(3, ge=0, description="updates in a row that are skipped as spikes; what stays is a new level")
    rewinds: int = Field(
        0, ge=0, description="times to go back to the last checkpoint before the trouble, also for non-finite losses"
    )
    rate: float = Field(0.5, gt=0, le=1, description="factor on the learning rate from each rewind on")


class StopOptions(Options):
    """When to end before the budget. Needs held-out data."""

    every: int = Field(100, ge=1, description="steps between the evaluations that decide")
    patience: int = Field(5, ge=1, description="evaluations without progress that end the run")
    min_delta: float = Field(0.0, ge=0, description="fall of the held-out loss, nats, that counts as progress")
    gain: float | None = Field(
        None, gt=0, description="stop when the next doubling of tokens is predicted to buy less, nats; null = never"
    )
    sequences: int = Field(256, ge=1, description="held-out sequences of such an evaluation")


class SampleOptions(Options):
    """Text the model writes on the way, for the report."""

    every: int = Field(ge=1, description="steps between samples; the last step always has one")
    prompts: tuple[str, ...] = Field(("The", "In this"), min_length=1, description="beginnings the model continues")
    tokens: int = Field(32, ge=1, le=512, description="tokens to write after each prompt")
    temperature: float = Field(0.8, ge=0, description="softness of the choice; 0 = the most likely token")


class ProfileOptions(Options):
    """Which steps to profile: `steps=10..12`, or the two ends by name. Written as artifacts of the stage."""

    first: int = Field(ge=2, description="first profiled step, counted from 1; the first step warms up and is no guide")
    last: int = Field(ge=2, description="last profiled step; each adds 1 to 20 MB of trace")
    memory: bool = Field(True, description="also a memory snapshot (CUDA) or memory timeline (CPU)")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        found = _RANGE.match(value.strip())
        if found is None:
            raise ValueError(f"{value!r}: write steps=10..12")
        return {"first": int(found[1]), "last": int(found[2])}

    @field_validator("last")
    @classmethod
    def _in_order(cls, value: int, info: Any) -> int:
        if value < info.data.get("first", value):
            raise ValueError("the last profiled step is before the first")
        return value


ProfileRange = Annotated[
    ProfileOptions,
    WithJsonSchema({"anyOf": [{"type": "string", "examples": ["steps=10..12"]}, ProfileOptions.model_json_schema()]}),
]
"""The options, or the text `steps=10..12`."""
