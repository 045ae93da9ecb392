"""Makes the helpers of this folder importable here and in the processes the tests start."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from training_parts import write_tokens


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token folder: 400 training and 40 held-out sequences of 32 tokens, vocabulary 300, with structure to learn."""
    return write_tokens(tmp_path_factory.mktemp("tokens"))
