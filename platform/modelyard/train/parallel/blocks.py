"""Finding the parts of a transformers model that layouts act on: base model, blocks, final norm."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a transformer, of both stacks where it has encoder and decoder."""
    lists = {name: list(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    outer = [found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer:
        return []
    kind = type(max(outer, key=len)[0])
    return [block for stack in outer if type(stack[0]) is kind for block in stack]


def base_model(model: PreTrainedModel) -> nn.Module:
    """The model below the output layer (`model.model`, `model.transformer`)."""
    return model.base_model


def layer_list(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks directly below the base model."""
    lists = {name: child for name, child in base_model(model).named_children() if isinstance(child, nn.ModuleList)}
    name = max(lists, key=lambda key: len(lists[key]))
    return name, lists[name]


def final_norm(model: PreTrainedModel) -> nn.Module | None:
    """The norm after the last block; None where this stage has none."""
    base = base_model(model)
    found = next((getattr(base, name) for name in _NORMS if getattr(base, name, None) is not None), None)
    return None if isinstance(found, nn.Identity) else found
