"""A tiny checkpoint, and the application over an engine in this process."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]

from asking import MINUTES  # noqa: E402 - found by the path above
from listener import Listener  # noqa: E402 - found by the path above
from local import LocalServer  # noqa: E402 - found by the path above
from tiny import save_model  # noqa: E402 - found by the path above

from modelyard.serving.server import free_port  # noqa: E402


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its answers of 2,000 tokens take seconds: what shall happen in the midst of one does."""
    return save_model(tmp_path_factory.mktemp("served"), max_position_embeddings=2048)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's redis-server on a port of its own."""
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    folder = str(tmp_path_factory.mktemp("redis"))
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + MINUTES
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.05)
    yield f"redis://127.0.0.1:{port}/0"
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def local(tiny_model: Path) -> Iterator[LocalServer]:
    """The application under uvicorn with an engine in this process: everything but Ray."""
    server = LocalServer(tiny_model)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.server.shutdown()
