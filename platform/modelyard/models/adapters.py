"""Parameter-efficient adapters by PEFT: added before sharding, merged or saved on their own afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.models.options import AdapterOptions

if TYPE_CHECKING:
    from peft import PeftConfig


Task = Literal["CAUSAL_LM", "SEQ_CLS"]


def add_adapter(model: PreTrainedModel, options: AdapterOptions, seed: int, task: Task = "CAUSAL_LM") -> nn.Module:
    """Freezes `model` and puts an adapter's layers into it, the same on every worker for the same seed.

    Returns a `PeftModel`. Call it before the model is sharded. The score layer of a sequence classifier is trained
    whole.

    Raises:
        RecipeError: no layer of the model has one of the target names, or no adapter is asked for.
    """
    from peft import get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            adapted: nn.Module = get_peft_model(model, _peft(options, task))
        except ValueError as error:
            names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            kind = "lora" if options.lora is not None else "ia3"
            raise RecipeError(
                f"the model has no layer to adapt: {error}",
                place=f"adapter.{kind}.targets",
                mend=f"choose among {', '.join(names)}, or all-linear",
            ) from error
    return adapted


def _peft(options: AdapterOptions, task: Task) -> PeftConfig:
    from peft import IA3Config, LoraConfig

    if options.ia3 is not None:
        return IA3Config(
            target_modules=list(options.ia3.targets),
            feedforward_modules=list(options.ia3.feedforward),
            task_type=task,
        )
    if options.lora is None:
        raise RecipeError("no adapter is asked for", place="adapter", mend="give lora or ia3")
    lora = options.lora
    targets: Any = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilized,
        task_type=task,
    )


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
