"""Models as Hugging Face folders: `config.json`, `model*.safetensors`, `generation_config.json`, tokenizer files.

Only safetensors are read or written; a folder with pickled weights or remote code is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel

from modelyard.errors import DataError
from modelyard.models.build import attention, auto_class, build_on_meta
from modelyard.models.packing import keep_documents_apart

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def export_model(
    config: PretrainedConfig, state: Mapping[str, torch.Tensor], folder: Path, tokenizer: Path | None = None
) -> None:
    """Writes full (unsharded) weights as a folder that transformers, vLLM and the engine load.

    Args:
        config: the model's configuration; `use_cache` is switched on in what is written.
        state: parameter name -> tensor, complete.
        folder: written over.
        tokenizer: folder whose tokenizer files are copied beside the weights.

    Raises:
        DataError: `state` lacks a parameter of the model or has another shape.
    """
    model = build_on_meta(config, next(iter(state.values())).dtype)
    problems = model.load_state_dict(dict(state), strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if missing or problems.unexpected_keys:
        names = (missing + problems.unexpected_keys)[:3]
        raise DataError("the weights do not belong to this architecture", place=", ".join(names))
    model.config.use_cache = True
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
        set_special_tokens(model, folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder))
    model.config.use_cache = False


def set_special_tokens(model: PreTrainedModel, tokenizer: Path) -> None:
    """Tells the model's configuration which token ends a text, so that generation stops there."""
    words = AutoTokenizer.from_pretrained(str(tokenizer), trust_remote_code=False)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(words, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(words, name))


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies the tokenizer files that `source` has into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration of a model folder. Raises DataError when it is absent or not understood."""
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"not a model folder: {error}", place=str(folder)) from error
    config.use_cache = False
    return cast(PretrainedConfig, config)


def load_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Loads a model folder on the CPU with SDPA attention, for training.

    Raises:
        DataError: the folder has no safetensors weights or is not of an architecture transformers knows.
    """
    if not any(folder.glob("*.safetensors")):
        raise DataError(
            "the folder holds no *.safetensors weights; pickled weights are not read",
            place=str(folder),
            mend="convert the model with save_pretrained(safe_serialization=True)",
        )
    config = read_config(folder)
    model = auto_class(config).from_pretrained(
        str(folder),
        config=config,
        dtype=dtype,
        attn_implementation=attention(config),
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
    )
    return keep_documents_apart(cast(PreTrainedModel, model))
