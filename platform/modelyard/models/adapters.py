"""Parameter-efficient adapters by PEFT: added before sharding, merged or saved on their own afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.models.options import LoraOptions


def add_adapter(model: PreTrainedModel, options: LoraOptions, seed: int) -> nn.Module:
    """Freezes `model` and puts LoRA layers into it, the same on every worker for the same seed.

    Returns a `PeftModel`. Call it before the model is sharded.

    Raises:
        RecipeError: no linear layer of the model has one of the target names.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    targets: Any = options.targets if isinstance(options.targets, str) else list(options.targets)
    config = LoraConfig(
        r=options.r,
        lora_alpha=cast(int, options.alpha),
        lora_dropout=options.dropout,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = get_peft_model(model, config)
        except ValueError as error:
            names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise RecipeError(
                f"the model has no layer to adapt: {error}",
                place="adapter.lora.targets",
                mend=f"choose among {', '.join(names)}, or all-linear",
            ) from error
    return adapted


def merge_adapter(model: nn.Module) -> PreTrainedModel:
    """The plain model with the adapter's update added to its weights. The adapted model must be unsharded."""
    merged: PreTrainedModel = cast(Any, model).merge_and_unload()
    return merged


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the adapter alone as PEFT's folder: `adapter_config.json`, `adapter_model.safetensors`."""
    cast(Any, model).save_pretrained(str(folder), safe_serialization=True)


def load_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """A model with a saved adapter on top, not merged; reads safetensors only."""
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    return adapted
