"""LoRA adapters (arXiv:2106.09685) in PEFT's form: read once, applied to the rows of a step that ask for them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modelyard.engine.checkpoint import check_adapter, read_tensors
from modelyard.engine.linear import Linear
from modelyard.engine.weights import Module
from modelyard.errors import DataError

_NAME = re.compile(r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")


@dataclass
class Delta:
    """What an adapter adds to one fused product: `y += (x down^T) up^T`. down: [r, in], up: [out, r]."""

    down: Tensor
    up: Tensor


@dataclass
class Adapter:
    """A loaded adapter. `salt` goes into block digests: its keys and values are not the base model's."""

    name: str
    salt: bytes
    deltas: dict[tuple[int, str], Delta] = field(default_factory=dict)
    _placed: Adapter | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same with its matrices on a device and in a type; they are moved once."""
        if self._placed is None:
            moved = {k: Delta(d.down.to(device, dtype), d.up.to(device, dtype)) for k, d in self.deltas.items()}
            self._placed = Adapter(self.name, self.salt, moved)
        return self._placed

    def apply(self, key: tuple[int, str], x: Tensor, y: Tensor, rows: Tensor | None) -> None:
        """Adds this adapter's share to `y` [T, out] for `rows` of `x` [T, in]; None = all rows."""
        delta = self.deltas.get(key)
        if delta is None:
            return
        if rows is None:
            y.addmm_((x @ delta.down.T), delta.up.T)
        else:
            y.index_add_(0, rows, (x[rows] @ delta.down.T) @ delta.up.T)


Groups = tuple[tuple[Adapter, Tensor | None], ...]
"""The adapters of a step with the rows that ask for each; None = all rows."""


def product(linear: Linear, key: tuple[int, str], x: Tensor, groups: Groups) -> Tensor:
    """A product of the base with what adapters add to it. x: [rows, in]."""
    y = linear(x)
    for adapter, rows in groups:
        adapter.apply(key, x, y, rows)
    return y


def read_adapter(name: str, folder: Path, modules: Mapping[str, Module], salt: bytes) -> Adapter:
    """Reads a PEFT LoRA folder for a base with these modules.

    Raises DataError for a folder that is no LoRA adapter, holds what could execute, or belongs to another base.
    """
    config = check_adapter(folder)
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder):
        found = _NAME.match(key)
        if found is None:
            raise DataError(
                f"tensor {key} is not part of a LoRA adapter this engine applies",
                place=str(folder),
                mend="merge the adapter into its base",
            )
        pairs.setdefault(found["module"], {})[found["side"]] = value.float()
    adapter = Adapter(name, salt)
    parts: dict[tuple[int, str], list[tuple[Module, Tensor, Tensor]]] = {}
    for module_name, pair in pairs.items():
        module = _module(module_name, pair, modules, str(folder))
        parts.setdefault(module.key, []).append((module, pair["A"], pair["B"] * _scale(config, module_name, pair["A"])))
    adapter.deltas = {key: _fuse(items) for key, items in parts.items()}
    return adapter


def _module(name: str, pair: Mapping[str, Tensor], modules: Mapping[str, Module], place: str) -> Module:
    module = modules.get(name)
    if module is None:
        raise DataError(f"the adapter changes {name}, which this base has not or cannot adapt", place=place,
                        mend="load it with the base it was trained on")  # fmt: skip
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        raise DataError(f"{name} has only one of its two LoRA matrices", place=place, mend="restore the adapter")
    if a.shape[1] != module.columns or b.shape[0] != module.rows or a.shape[0] != b.shape[1]:
        raise DataError(
            f"the adapter's {name} is {b.shape[0]} x {a.shape[1]}, the base's {module.rows} x {module.columns}",
            place=place,
            mend="load it with the base it was trained on",
        )
    return module


def _scale(config: Mapping[str, Any], name: str, a: Tensor) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (arXiv:2312.03732)."""
    alpha = float(config.get("lora_alpha") or 1)
    for pattern, value in dict(config.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith("." + pattern) or re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name):
            alpha = float(value)
    rank = a.shape[0]
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fuse(items: list[tuple[Module, Tensor, Tensor]]) -> Delta:
    """The modules that share one of our matrices as one pair: their A stacked, their B in blocks."""
    rank = sum(a.shape[0] for _, a, _ in items)
    rows = items[0][0].linear.rows
    up, at = torch.zeros(rows, rank), 0
    for module, a, b in items:
        up[module.start : module.start + module.rows, at : at + a.shape[0]] = b
        at += a.shape[0]
    return Delta(torch.cat([a for _, a, _ in items]).contiguous(), up)
