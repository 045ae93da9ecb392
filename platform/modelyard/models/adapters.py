"""Parameter-efficient adapters by PEFT: added before sharding, merged or saved on their own afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.models.nf4 import quantize_matrices, restore_matrices
from modelyard.models.options import AdapterOptions, PromptOptions

if TYPE_CHECKING:
    from peft import PeftConfig


Task = Literal["CAUSAL_LM", "SEQ_CLS"]


def add_adapter(
    model: PreTrainedModel,
    options: AdapterOptions,
    seed: int,
    task: Task = "CAUSAL_LM",
    rows: range | None = None,
) -> nn.Module:
    """Freezes `model` and puts an adapter's layers into it, the same on every worker for the same seed.

    Returns a `PeftModel`. Call it before the model is sharded. The score layer of a sequence classifier is trained
    whole.

    With `lora.quantize` the frozen matrices are put into four bits first. `rows` of the embeddings, those of new
    tokens, are trained whole beside LoRA (PEFT's trainable tokens).

    With `prompt` the vectors stand before every row of a batch, so that a row must be one document.

    Raises:
        RecipeError: no layer of the model has one of the target names or can be quantized, or no adapter is asked
            for.
    """
    from peft import get_peft_model

    if options.lora is not None and options.lora.quantize is not None:
        quantize_matrices(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            if options.prompt is not None:
                return _prompted(model, options.prompt, task)
            adapted: nn.Module = get_peft_model(model, _peft(options, task, _trained_rows(model, rows)))
        except ValueError as error:
            names = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            kind = "lora" if options.lora is not None else "ia3"
            raise RecipeError(
                f"the model has no layer to adapt: {error}",
                place=f"adapter.{kind}.targets",
                mend=f"choose among {', '.join(names)}, or all-linear",
            ) from error
    return adapted


def _prompted(model: PreTrainedModel, options: PromptOptions, task: Task) -> nn.Module:
    """The model with learned vectors before its input. Logits stay those of the input's own tokens."""
    from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

    common: dict[str, Any] = {"task_type": task, "num_virtual_tokens": options.tokens}
    if options.kind == "prefix":
        adapted: nn.Module = get_peft_model(model, PrefixTuningConfig(**common))
    elif options.kind == "prompt":
        adapted = get_peft_model(model, PromptTuningConfig(**common))
    else:
        adapted = get_peft_model(model, PromptEncoderConfig(**common, encoder_hidden_size=options.hidden))
    # Positions that restart mean packed documents to transformers; a row here is one, counted on from the vectors.
    adapted.register_forward_pre_hook(_no_positions, with_kwargs=True)
    if options.kind == "prefix":
        return adapted
    head: nn.Module = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, options.tokens :], *inputs[1:]))
    return adapted


def _no_positions(
    _: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return inputs, {name: value for name, value in named.items() if name != "position_ids"}


def _trained_rows(model: PreTrainedModel, rows: range | None) -> dict[str, list[int]] | None:
    """PEFT's names of what holds a row for each token; output rows that are the input's are PEFT's own matter."""
    if rows is None:
        return None
    holders: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    if holders[1] is None or holders[1].weight is holders[0].weight:
        holders.pop()
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    return {names[id(module)]: list(rows) for module in holders}


def _peft(options: AdapterOptions, task: Task, rows: dict[str, list[int]] | None) -> PeftConfig:
    from peft import IA3Config, LoraConfig

    if options.ia3 is not None:
        return IA3Config(
            target_modules=list(options.ia3.targets),
            feedforward_modules=list(options.ia3.feedforward),
            task_type=task,
        )
    if options.lora is None:
        raise RecipeError("no adapter is asked for", place="adapter", mend="give lora, ia3 or prompt")
    lora = options.lora
    targets: Any = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    return LoraConfig(
        r=lora.r,
        lora_alpha=cast(int, lora.alpha),
        lora_dropout=lora.dropout,
        target_modules=targets,
        use_dora=lora.dora,
        use_rslora=lora.rank_stabilized,
        trainable_token_indices=rows,
        task_type=task,
    )


def merge_adapter(model: nn.Module) -> PreTrainedModel:
    """The plain model with the adapter's update added to its weights: to those it was trained on, where they were in
    four bits. The adapted model must be unsharded."""
    restore_matrices(model)
    merged: PreTrainedModel = cast(Any, model).merge_and_unload()
    return merged


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Writes the adapter alone as PEFT's folder: `adapter_config.json`, `adapter_model.safetensors`."""
    cast(Any, model).save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)


def load_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """A model with a saved adapter on top, not merged; reads safetensors only."""
    from peft import PeftModel

    adapted: nn.Module = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    return adapted
