"""A real small tokenizer, token shards of real sentences, and a tiny model; helpers are importable here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from evaluate_parts import make_model, write_tokens


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenize artifact's folder: `tokenizer/` and `heldout/` of 60 documents."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def model_folder(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights."""
    folder = tmp_path_factory.mktemp("model")
    make_model(tokens, folder)
    return folder
