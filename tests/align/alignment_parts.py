"""A tiny model folder for alignment tests."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from training_parts import TINY, VOCABULARY, tokenizer

from modelyard.models.build import build_config, build_on_meta, initialise, materialise
from modelyard.models.export import export_model
from modelyard.tokens.tokenizer import save_tokenizer


def write_policy(folder: Path) -> Path:
    """A Llama of 28 k parameters with random weights, larger than at initialisation so that its answers differ."""
    save_tokenizer(tokenizer(), folder / "tokenizer")
    config = build_config(TINY.model_copy(update={"max_position_embeddings": 128}), VOCABULARY)
    model = build_on_meta(config)
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    state = {name: value * (8 if value.ndim > 1 else 1) for name, value in model.named_parameters()}
    export_model(config, state, folder / "model", folder / "tokenizer")
    return folder / "model"
