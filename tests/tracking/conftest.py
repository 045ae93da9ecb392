"""A real MLflow server for the whole session, which a test may kill and start again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.tracking.store import defaults


class Server:
    """`mlflow server` over SQLite with proxied artifacts, on a port it keeps when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd=self.folder,
                env={**os.environ, **defaults()},
            )
        deadline = time.monotonic() + 120
        while not self._healthy():
            log_tail = (self.folder / "server.log").read_text()[-2000:]
            assert self.process.poll() is None, f"mlflow server ended: {log_tail}"
            assert time.monotonic() < deadline, f"mlflow server did not start in 120 s: {log_tail}"
            time.sleep(0.2)

    def kill(self) -> None:
        """kill -9 of the server and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture(scope="session")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow-server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def _schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from modelyard.tracking.store import connect, find_store

    root = tmp_path_factory.mktemp("schema")
    connect(find_store(str(root)))
    return root / "mlflow" / "mlflow.db"


@pytest.fixture
def root(tmp_path: Path, _schema: Path) -> Path:
    """A root whose empty MLflow database is a copy: making the schema anew costs every test seconds."""
    folder = tmp_path / "root"
    (folder / "mlflow").mkdir(parents=True)
    shutil.copy(_schema, folder / "mlflow" / "mlflow.db")
    return folder
