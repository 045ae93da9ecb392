"""How many bytes a number takes where: weights, gradients, optimizer states, activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelyard.errors import RecipeError

PrecisionName = Literal["fp32", "mixed", "master", "bf16"]
DTYPE_BYTES = {"fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "int4": 0.5, "fp4": 0.5}


@dataclass(frozen=True)
class Precision:
    """Bytes a value of stored weights, gathered (compute) weights, gradients and activations; peak's dtype."""

    weights: int
    compute: int
    gradients: int
    master: int
    dtype: str


PRECISIONS: dict[str, Precision] = {
    # Everything in single precision.
    "fp32": Precision(weights=4, compute=4, gradients=4, master=0, dtype="fp32"),
    # FSDP2's mixed precision: fp32 weights, gathered and computed with in bf16, gradients kept in fp32.
    "mixed": Precision(weights=4, compute=2, gradients=4, master=0, dtype="bf16"),
    # Megatron-LM's: bf16 weights, fp32 gradients, an fp32 copy of the weights beside the optimizer states.
    "master": Precision(weights=2, compute=2, gradients=4, master=4, dtype="bf16"),
    # Pure bf16, states too.
    "bf16": Precision(weights=2, compute=2, gradients=2, master=0, dtype="bf16"),
}


def precision(name: str | Precision) -> Precision:
    """A row of `PRECISIONS`. Raises RecipeError for an unknown name."""
    if isinstance(name, Precision):
        return name
    if name not in PRECISIONS:
        raise RecipeError(f"unknown precision {name!r}", place="precision", mend="use " + ", ".join(PRECISIONS))
    return PRECISIONS[name]


_STATES = {"adamw": 2, "adam": 2, "muon": 1, "lion": 1, "momentum": 1, "sgd": 0}
OPTIMIZERS = (*_STATES, "adamw8bit", "adafactor")


def optimizer_bytes(name: str, weights: int, *, matrix_share: float = 1.0, width: int = 4096) -> float:
    """Bytes a parameter of optimizer state.

    States take the dtype of the weights they are built on. 8-bit AdamW keeps two bytes and a scale
    a block of 256. Muon keeps one momentum for the hidden matrices (`matrix_share` of the parameters)
    and AdamW's two for the rest. Adafactor keeps a row and a column of a matrix of `width`.

    Raises:
        RecipeError: unknown optimizer.
    """
    if name == "adamw8bit":
        return 2 * (1 + 4 / 256)
    if name == "adafactor":
        return 8.0 / width
    if name == "muon":
        return weights * (matrix_share + 2 * (1 - matrix_share))
    if name not in _STATES:
        raise RecipeError(f"unknown optimizer {name!r}", place="optimizer", mend="use " + ", ".join(sorted(OPTIMIZERS)))
    return float(weights * _STATES[name])
