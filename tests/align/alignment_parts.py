"""A tiny model folder for alignment tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from training_parts import TINY, VOCABULARY, tokenizer

from modelyard.align.reward_model import load_classifier, write_classifier
from modelyard.align.roles import Roles
from modelyard.models.build import build_config, build_on_meta, initialise, materialise
from modelyard.models.export import export_model
from modelyard.models.options import AdapterOptions
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


def write_reward_model(policy: Path, folder: Path, seed: int) -> Path:
    """A reward model on the policy's body with a score layer drawn at random."""
    state = dict(load_classifier(policy, seed).named_parameters())
    write_classifier(policy, AdapterOptions(lora=None), seed, state, folder)
    return folder


class AnsweredBy(Roles):
    """Roles of this process, but for the engines, which `make` makes of their settings."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self._make = make

    def pool(self, model: Path, settings: Any, telling: Any, leads: bool) -> Any:
        return self._make(settings)
