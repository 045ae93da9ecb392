"""The MLflow UI over a root's store, bound to loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass

from modelyard.errors import ResourceError, StorageError
from modelyard.tracking.store import defaults, find_store

HOST = "127.0.0.1"
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Ui:
    """How to show the UI: run `command` with `env` and open `url`; no command when a server already runs."""

    url: str
    command: tuple[str, ...]
    env: dict[str, str]


def ui(root: str, port: int = 5000, uri: str | None = None) -> int:
    """Runs the UI of a root's store until it ends or Ctrl-C; returns its exit status.

    When `MLFLOW_TRACKING_URI` names a server, that server shows the runs: its address is printed and
    nothing is started.

    Raises:
        ResourceError: the port is in use.
        StorageError: nothing has been tracked under this root.
    """
    found = ui_command(root, port, uri)
    if not found.command:
        print(f"these runs are shown by the server at {found.url}", file=sys.stderr)
        return 0
    # A session of its own: MLflow starts several processes, and all of them have to go with this one.
    server = subprocess.Popen(found.command, env=found.env, start_new_session=True)
    try:
        return server.wait()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=_PATIENCE_S)


def ui_command(root: str, port: int = 5000, uri: str | None = None) -> Ui:
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
