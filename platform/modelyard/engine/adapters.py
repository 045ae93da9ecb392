"""LoRA adapters (arXiv:2106.09685) in PEFT's form: read once, applied to the rows of a step that ask for them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from modelyard.engine.checkpoint import check_adapter, read_tensors
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
    folder: Path
    deltas: dict[tuple[int, str], Delta] = field(default_factory=dict)
    _placed: Adapter | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Adapter:
        """The same with its matrices on a device and in a type; they are moved once."""
        if self._placed is None:
            moved = {k: Delta(d.down.to(device, dtype), d.up.to(device, dtype)) for k, d in self.deltas.items()}
            self._placed = Adapter(self.name, self.salt, self.folder, moved)
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


def product(linear: Callable[[Tensor], Tensor], key: tuple[int, str], x: Tensor, groups: Groups) -> Tensor:
    """A product of the base with what adapters add to it. x: [rows, in]."""
    y = linear(x)
    for adapter, rows in groups:
        adapter.apply(key, x, y, rows)
    return y


class Adaptable(Protocol):
    """What reading an adapter asks of a base, see `weights.Weights`."""

    @property
    def modules(self) -> Mapping[str, Module]: ...

    @property
    def share(self) -> Callable[[str, str, Tensor], Tensor] | None: ...


def read_adapter(name: str, folder: Path, base: Adaptable, salt: bytes) -> Adapter:
    """Reads a PEFT LoRA folder for a base; where the base is a slice of a model, this slice's part of it.

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
    adapter = Adapter(name, salt, folder)
    parts: dict[tuple[int, str], list[tuple[Module, Tensor, Tensor]]] = {}
    for module_name, pair in pairs.items():
        for module, a, b in _matrices(module_name, pair, config, base, str(folder)):
            parts.setdefault(module.key, []).append((module, a, b))
    adapter.deltas = {key: _fuse(items) for key, items in parts.items()}
    return adapter


def _matrices(
    name: str, pair: Mapping[str, Tensor], config: Mapping[str, Any], base: Adaptable, place: str
) -> Iterator[tuple[Module, Tensor, Tensor]]:
    """The modules a pair of matrices changes, with A and the scaled B of each: one, or every expert of a layer."""
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        raise DataError(f"{name} has only one of its two LoRA matrices", place=place, mend="restore the adapter")
    candidates = _candidates(name, base.modules)
    if not candidates:
        raise DataError(f"the adapter changes {name}, which this base has not or cannot adapt", place=place,
                        mend="load it with the base it was trained on")  # fmt: skip
    for full, module in candidates:
        own_a, own_b = (base.share(full, "A", a), base.share(full, "B", b)) if base.share else (a, b)
        many = module.stacked or 1
        if own_a.shape[1] == module.columns and own_b.shape[0] == module.rows and own_a.shape[0] == own_b.shape[1] \
                and own_a.shape[0] % many == 0:  # fmt: skip
            rank = own_a.shape[0] // many
            yield from _spread(module, own_a, own_b * _scale(config, full, rank), rank)
            return
    module = candidates[0][1]
    raise DataError(
        f"the adapter's {name} is {b.shape[0]} x {a.shape[1]}, the base's {module.rows} x {module.columns}",
        place=place,
        mend="load it with the base it was trained on",
    )


def _candidates(name: str, modules: Mapping[str, Module]) -> list[tuple[str, Module]]:
    """The modules an adapter may mean by a name.

    PEFT wraps a layer's experts once for each of their two parameters, and says in the name how deep a wrapper lies,
    not which parameter it is for: the shape of its matrices tells.
    """
    for known in (name, name.replace(".mlp.", ".block_sparse_moe.")):  # Mixtral in transformers 5, and in its files
        if known in modules:
            return [(known, modules[known])]
        stack = known.removesuffix(".base_layer")
        found = [f"{stack}.{leaf}" for leaf in ("gate_up_proj", "down_proj") if f"{stack}.{leaf}" in modules]
        if found and modules[found[0]].stacked:
            return [(full, modules[full]) for full in found]
    return []


def _spread(module: Module, a: Tensor, b: Tensor, rank: int) -> Iterator[tuple[Module, Tensor, Tensor]]:
    """One module as it is; stacked ones by expert. PEFT keeps A of all experts one after the other, B interleaved."""
    if not module.stacked:
        yield module, a, b
        return
    downs = a.view(module.stacked, rank, -1)
    ups = b.view(b.shape[0], rank, module.stacked).permute(2, 0, 1)
    layer, half = module.key
    for index in range(module.stacked):
        yield replace(module, key=(layer, f"experts.{index}.{half}"), stacked=0), downs[index], ups[index]


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilized LoRA (arXiv:2312.03732); the first pattern that fits counts."""
    patterns = dict(config.get("alpha_pattern") or {})
    alpha = next((v for p, v in patterns.items() if re.match(rf"(?:.*\.)?(?:{p})$", name)), None)
    alpha = float((config.get("lora_alpha") or 1) if alpha is None else alpha)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _fuse(items: list[tuple[Module, Tensor, Tensor]]) -> Delta:
    """The modules that share one of our matrices as one pair: their A stacked, their B in blocks."""
    if len(items) == 1 and items[0][0].rows == items[0][0].height:
        return Delta(items[0][1].contiguous(), items[0][2].contiguous())
    rank = sum(a.shape[0] for _, a, _ in items)
    up, at = torch.zeros(items[0][0].height, rank), 0
    for module, a, b in items:
        up[module.start : module.start + module.rows, at : at + a.shape[0]] = b
        at += a.shape[0]
    return Delta(torch.cat([a for _, a, _ in items]).contiguous(), up)
