"""A tiny checkpoint on disk, shared by the engine's tests, and the device they run on.

`MODELYARD_TEST_DEVICE=cuda pytest tests/engine` runs all of them on a GPU; `paged` runs what a GPU would, on a CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from marks import DEVICE
from tiny import save_model

from modelyard.engine import EngineCore


@pytest.fixture(scope="session", autouse=True)
def _device() -> None:
    from modelyard.engine import EngineOptions
    from modelyard.engine import build as build

    if DEVICE != "cpu":
        EngineOptions.model_fields["device"].default = "cuda"
        EngineOptions.model_rebuild(force=True)
    if DEVICE == "paged":
        build.gpu = lambda: torch.device("cpu")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def cores() -> Iterator[list[EngineCore]]:
    """Engines that are closed whatever happens."""
    made: list[EngineCore] = []
    yield made
    for core in made:
        core.close()
