"""A tiny model and a tokenizer with a chat template, built once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from alignment_parts import write_policy


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with its tokenizer."""
    return write_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="session")
def words(model_folder: Path) -> Any:
    """The transformers tokenizer of the model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder)
