"""A policy's weights on their way from the trainer to an engine, under Hugging Face names, without touching a disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from modelyard.models.nf4 import quantized_layers

_PEFT = "base_model.model."

VALUE_HEAD = "value_head"
"""Name of the module that PPO puts beside a policy; no part of the model that answers."""


@torch.no_grad()
def policy_weights(model: nn.Module, changed_only: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the plain model, one whole at a time; LoRA and DoRA are merged into copies, matrices in four bits
    are dequantized (also where nothing changed them: an engine read the model's own).

    Sharded tensors are gathered one after the other, in the same order on every worker: all of them must run through
    it together, each to feed an engine of its own.

    Args:
        model: a transformers model, or a PEFT model with LoRA layers.
        changed_only: leave out what training cannot have changed.
    """
    adapted = {id(m) for _, m in _lora_layers(model)}
    for name, module in _lora_layers(model):
        yield _plain(f"{name}.weight"), merged(module)
    for name, module in quantized_layers(model):
        if not name.endswith(".base_layer"):
            yield _plain(f"{name}.weight"), module.weight
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


def _lora_layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def merged(module: Any, name: str = "default") -> torch.Tensor:
    """The weight a LoRA layer works like: W + s B A, for DoRA with every row brought to its learned length."""
    base = _whole(module.base_layer.weight)
    update = _whole(module.lora_B[name].weight) @ _whole(module.lora_A[name].weight) * module.scaling[name]
    transposed = bool(getattr(module, "fan_in_fan_out", False))
    found: torch.Tensor = base + (update.T if transposed else update)
    if name not in getattr(module, "lora_magnitude_vector", {}):
        return found
    length = _whole(module.lora_magnitude_vector[name].weight)
    rows = found.T if transposed else found
    rows *= (length / torch.linalg.norm(rows, dim=1)).unsqueeze(1)
    return rows.T if transposed else rows


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    value = parameter.detach()
    if isinstance(value, DTensor):
        whole: torch.Tensor = value.full_tensor()
        return whole
    return value


def _plain(name: str) -> str:
    return name.removeprefix(_PEFT).replace(".base_layer.", ".")
