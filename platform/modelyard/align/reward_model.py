"""Reward models as transformers sequence classifiers of one output: from a language model, and back to a folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from modelyard.errors import DataError
from modelyard.models.adapters import add_adapter, merge_adapter
from modelyard.models.build import attention
from modelyard.models.export import copy_tokenizer, read_config
from modelyard.models.options import AdapterOptions
from modelyard.models.packing import keep_documents_apart

PROCESS = "process_reward"
"""Entry of config.json that makes a classifier a process reward model: {"separator": what stands between steps}."""


def separator_of(config: Any) -> str | None:
    """What stands between the steps that a model scores; None = it scores whole answers."""
    found = getattr(config, PROCESS, None)
    return str(found["separator"]) if found else None


def load_classifier(folder: Path, seed: int | None = None) -> PreTrainedModel:
    """A classifier of one output on the body of a model folder.

    Args:
        folder: a language model, or a reward model.
        seed: draws a new score layer (normal, 1 / sqrt(width + 1): Stiennon et al. 2020, arXiv 2009.01325); None = the
            folder must have one.

    Raises:
        DataError: no safetensors, an architecture without such a head, or no score layer in the folder.
    """
    if not any(folder.glob("*.safetensors")):
        raise DataError("the folder holds no *.safetensors weights", place=str(folder), mend="save it as safetensors")
    config = read_config(folder)
    config.num_labels = 1
    if config.pad_token_id is None:
        config.pad_token_id = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).pad_token_id or 0
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(folder), config=config, dtype=torch.float32, attn_implementation=attention(config),
            use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True,
        )  # fmt: skip
    except ValueError as error:
        raise DataError(f"no reward model can be made of it: {error}", place=str(folder)) from error
    fresh = any(name.startswith("score") for name in found["missing_keys"])
    if fresh and seed is None:
        raise DataError(
            "the folder is no reward model: it has no score layer", place=str(folder), mend="give a `reward` stage's"
        )
    if fresh:
        _draw(model.score.weight, cast(int, seed))
    return keep_documents_apart(cast(PreTrainedModel, model))


@torch.no_grad()
def _draw(weight: torch.Tensor, seed: int | None) -> None:
    generator = torch.Generator().manual_seed(seed or 0)
    weight.copy_(torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5)


def write_classifier(
    source: Path,
    adapter: AdapterOptions,
    seed: int,
    state: Mapping[str, torch.Tensor],
    target: Path,
    separator: str | None = None,
) -> None:
    """Rebuilds the classifier, loads what was trained, merges an adapter and saves the folder with its tokenizer; with
    a `separator` as a process reward model.

    Raises:
        DataError: the weights are of another model.
    """
    model: Any = load_classifier(source, seed)
    if not adapter.full:
        model = add_adapter(model, adapter, seed, "SEQ_CLS")
    unknown = model.load_state_dict(dict(state), strict=False).unexpected_keys
    if unknown:
        raise DataError(f"the weights do not fit the model: {unknown[0]}", place=str(source))
    plain = model if adapter.full else merge_adapter(model)
    if separator is not None:
        setattr(plain.config, PROCESS, {"separator": separator})
    elif hasattr(plain.config, PROCESS):
        delattr(plain.config, PROCESS)
    copy_tokenizer(source, target)
    plain.save_pretrained(str(target))
