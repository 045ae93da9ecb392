"""A tiny checkpoint, and the application over an engine in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]

from local import LocalServer  # noqa: E402 - found by the path above
from tiny import save_model  # noqa: E402 - found by the path above


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="session")
def local(tiny_model: Path) -> Iterator[LocalServer]:
    """The application under uvicorn with an engine in this process: everything but Ray."""
    server = LocalServer(tiny_model)
    yield server
    server.stop()
