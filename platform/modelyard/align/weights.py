"""A policy's weights on their way from the trainer to an engine, under Hugging Face names, without touching a disk.

Of a matrix with LoRA or DoRA only the adapter's own matrices travel, a few percent of its bytes. The engine's side adds
them to the matrix of the model folder (`BaseWeights`) and computes with the sum: a decode step costs what it costs
without an adapter, whatever the precision it is packed for. Applying the adapter beside the matrix would save the sums,
once an update, and cost two more products a matrix in every step of every answer; DoRA could not have it at all. What
the sums are made from is no copy in memory but the folder's files, mapped: pages that the system may drop and read
again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from modelyard.engine.checkpoint import tensor_files
from modelyard.errors import DataError
from modelyard.models.nf4 import Nf4Linear, dequantize, quantize, quantized_layers

_PEFT = "base_model.model."

VALUE_HEAD = "value_head"
"""Name of the module that PPO puts beside a policy; no part of the model that answers."""


@dataclass(frozen=True)
class Change:
    """What an adapter makes of a matrix W, in the layout of the model's file: W + left right, for DoRA (`length`) with
    every row or column brought to its learned length.

    Attributes:
        parts: left [rows, r] with the adapter's scale in it, right [r, columns], perhaps length [rows, 1] or
            [1, columns].
        quantized: whether W is in four bits (`models.nf4`).
    """

    parts: tuple[torch.Tensor, ...]
    quantized: bool = False

    def cpu(self) -> Change:
        """The same in this machine's memory."""
        return Change(tuple(part.cpu() for part in self.parts), self.quantized)

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(part.nbytes for part in self.parts)

    @torch.no_grad()
    def merged(self, base: torch.Tensor) -> torch.Tensor:
        """The matrix to compute with, fp32, on the device of the parts."""
        left, right, *length = (part.float() for part in self.parts)
        found = torch.addmm(base.to(left.device, torch.float32), left, right)
        for each in length:
            found *= each / torch.linalg.norm(found, dim=int(each.shape[1] == 1), keepdim=True)
        return found


Weights = Iterable[tuple[str, torch.Tensor | Change]]
"""Whole tensors, and changes of those in the model's folder, by Hugging Face names."""


@torch.no_grad()
def policy_weights(model: nn.Module, changed_only: bool = False) -> Iterator[tuple[str, torch.Tensor | Change]]:
    """Every tensor of the plain model, one at a time: whole, or where it has LoRA or DoRA as a `Change`. So have
    matrices in four bits without any, whose change is of rank 0: an engine read the model's own.

    Sharded tensors are gathered one after the other, in the same order on every worker: all of them must run through
    it together, each to feed an engine of its own.

    Args:
        model: a transformers model, or a PEFT model with LoRA layers.
        changed_only: leave out what training cannot have changed.
    """
    adapted = {id(m) for _, m in _lora_layers(model)}
    for name, module in _lora_layers(model):
        yield _plain(f"{name}.weight"), _change(module)
    for name, module in quantized_layers(model):
        if not name.endswith(".base_layer"):
            none = (torch.zeros(module.out_features, 0), torch.zeros(0, module.in_features))
            yield _plain(f"{name}.weight"), Change(none, quantized=True)
    inside = {id(p) for _, m in model.named_modules() if id(m) in adapted for p in m.parameters()}
    inside |= {id(p) for _, m in quantized_layers(model) for p in (m.codes, m.magnitudes)}
    for name, parameter in model.named_parameters():
        beside = id(parameter) in inside or name.startswith(f"{VALUE_HEAD}.")
        if beside or (changed_only and not parameter.requires_grad):
            continue
        yield _plain(name), _whole(parameter)
    for name, module in _lora_layers(model):
        bias = getattr(module.base_layer, "bias", None)
        if bias is not None and not changed_only:
            yield _plain(f"{name}.bias"), _whole(bias)


class BaseWeights:
    """The matrices of a model's folder, which changes are made of; of those in four bits the codes are kept.

    Args:
        folder: of the model before training.

    Raises:
        DataError: there are no safetensors files.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self._folder = folder
        handles = [safe_open(str(file), framework="pt") for file in tensor_files(folder)]
        self._files: dict[str, Any] = {name: handle for handle in handles for name in _names(handle)}
        self._quantized: dict[str, tuple[torch.Tensor, ...]] = {}

    def whole(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole tensors, one at a time. Raises DataError for a change of a tensor that the folder has not."""
        for name, value in weights:
            yield name, value.merged(self._base(name, value.quantized)) if isinstance(value, Change) else value

    def _base(self, name: str, quantized: bool) -> torch.Tensor:
        if not quantized:
            return self._read(name)
        matrix: torch.Tensor | None = None
        if name not in self._quantized:
            matrix = self._read(name).float()
            self._quantized[name] = quantize(matrix)
        shape = matrix.shape if matrix is not None else self._read(name).shape
        return dequantize(self._quantized[name], (shape[0], shape[1]))

    def _read(self, name: str) -> torch.Tensor:
        short = name.partition(".")[2]  # the first GPT-2 files name the body's tensors without the body
        for known in (name, short):
            if known in self._files:
                found: torch.Tensor = self._files[known].get_tensor(known)
                return found
        raise DataError(f"the model's files have no tensor {name}, which the adapter changes", place=str(self._folder),
                        mend="choose other adapter targets, or train all parameters (lora: null)")  # fmt: skip


def _names(handle: Any) -> list[str]:
    return list(handle.keys())


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def _change(module: Any, name: str = "default") -> Change:
    left = _whole(module.lora_B[name].weight) * module.scaling[name]
    right = _whole(module.lora_A[name].weight)
    transposed = bool(getattr(module, "fan_in_fan_out", False))
    parts = (right.T, left.T) if transposed else (left, right)
    if name in getattr(module, "lora_magnitude_vector", {}):
        length = _whole(module.lora_magnitude_vector[name].weight)
        parts = (*parts, length.unsqueeze(0 if transposed else 1))
    return Change(parts, isinstance(module.base_layer, Nf4Linear))


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    if isinstance(value, DTensor):
        whole: torch.Tensor = value.full_tensor()
        return whole
    return value


def _plain(name: str) -> str:
    return name.removeprefix(_PEFT).replace(".base_layer.", ".")
