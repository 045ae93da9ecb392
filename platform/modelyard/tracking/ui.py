"""The command that opens the MLflow UI over a root's store."""

from __future__ import annotations

import os
import socket
import sys
from dataclasses import dataclass

from modelyard.errors import ResourceError, StorageError
from modelyard.tracking.store import defaults, find_store

HOST = "127.0.0.1"


@dataclass(frozen=True)
class Ui:
    """How to show the UI: run `command` with `env` and open `url`; no command when a server already runs."""

    url: str
    command: tuple[str, ...]
    env: dict[str, str]


def ui(root: str, port: int = 5000, uri: str | None = None) -> Ui:
    """The command for the UI of a root's store, bound to 127.0.0.1.

    Raises:
        ResourceError: the port is in use.
        StorageError: nothing has been tracked under this root.
    """
    store = find_store(root, uri)
    if store.remote:
        return Ui(store.uri, (), {})
    if store.embedded and not (store.folder / "mlflow.db").exists():
        raise StorageError("nothing has been tracked here yet", place=str(store.folder), mend="run a recipe first")
    _expect_free(port)
    command = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store.uri, "--registry-store-uri", store.uri]
    if store.artifacts:
        command += ["--default-artifact-root", store.artifacts]
    return Ui(f"http://{HOST}:{port}", tuple(command), {**defaults(), **os.environ})


def _expect_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"port {port} cannot be used: {error}", place=f"{HOST}:{port}", mend="choose another with --port"
            ) from error
