"""Which MLflow store a root uses, and the one place where an MLflow client is made."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from modelyard.errors import StorageError
from modelyard.storage import is_remote
from modelyard.storage.uri import absolute

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_PROBE_S = 3.0
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # MLflow's own defaults (120 s, 7 retries with growing pauses) would stall training for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


class Unreachable(StorageError):
    """MLflow does not answer: the same call may succeed later."""


class Refused(StorageError):
    """MLflow answered and said no: the same call would fail again."""


@dataclass(frozen=True)
class Store:
    """Where the runs of one root go.

    Attributes:
        uri: MLflow tracking URI.
        artifacts: artifact location of new experiments; None leaves it to the server.
        folder: local folder for the embedded store and for spools.
        note: one sentence for people when the place is not under the root, else empty.
    """

    uri: str
    artifacts: str | None
    folder: Path
    note: str = ""

    @property
    def embedded(self) -> bool:
        """Whether the store is the SQLite file of modelyard's own."""
        return self.artifacts is not None

    @property
    def remote(self) -> bool:
        """Whether the store is a server."""
        return self.uri.startswith(("http://", "https://"))


def find_store(root: str, uri: str | None = None) -> Store:
    """The store of a root: the argument, `MLFLOW_TRACKING_URI`, or SQLite and a folder under the root.

    SQLite cannot live in an object store: with a root on s3:// it lies in `~/.modelyard/<hash of the root>`.
    """
    where, note = absolute(root), ""
    folder = Path(where) / "mlflow"
    if is_remote(where):
        folder = Path.home() / ".modelyard" / hashlib.sha256(where.encode()).hexdigest()[:12] / "mlflow"
        note = f"the root is remote, so MLflow's store is the local folder {folder} (or set MLFLOW_TRACKING_URI)"
    chosen = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if chosen:
        return Store(chosen, None, folder)
    return Store(f"sqlite:///{folder / 'mlflow.db'}", (folder / "artifacts").as_uri(), folder, note)


def connect(store: Store) -> MlflowClient:
    """A client of the store; creates the embedded database when there is none (about 3 s).

    Raises:
        Unreachable: the server does not answer, or the database cannot be opened.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if store.remote:
        _probe(store.uri)
    else:
        _make_folder(store)
    with translated(store.uri), _initialising(store), quiet():
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=store.uri, registry_uri=store.uri)
        client.search_experiments(max_results=1)
    return client


def defaults() -> dict[str, str]:
    """Environment variables that keep MLflow quiet, offline and impatient; a person's own come first."""
    return dict(_DEFAULTS)


@contextmanager
def translated(place: str) -> Iterator[None]:
    """Turns what MLflow and its database raise into :class:`Unreachable` or :class:`Refused`."""
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = Unreachable if _transient(error) else Refused
        raise kind(_first_line(error), place=place, mend=_mend(place) if kind is Unreachable else "") from error
    except (OSError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise Unreachable(_first_line(error), place=place, mend=_mend(place)) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps MLflow's and alembic's chatter about migrations off the screen."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.getLogger("mlflow").setLevel(logging.WARNING)


def _probe(uri: str) -> None:
    parts = urlsplit(uri)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_PROBE_S).close()
    except OSError as error:
        raise Unreachable(f"MLflow does not answer: {error}", place=uri, mend=_mend(uri)) from error


def _make_folder(store: Store) -> None:
    try:
        store.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Unreachable(f"the folder cannot be made: {error}", place=str(store.folder), mend="mend it") from error


@contextmanager
def _initialising(store: Store) -> Iterator[None]:
    # Two processes that create the same SQLite schema at once both fail: one at a time.
    if store.remote:
        yield
        return
    with (store.folder / ".init.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _transient(error: Exception) -> bool:
    # INTERNAL_ERROR is also MLflow's default for its own refusals; a failed HTTP call names itself.
    code = getattr(error, "error_code", "")
    if code == "INTERNAL_ERROR":
        return str(error).startswith("API request to")
    return code in ("TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED", "REQUEST_LIMIT_EXCEEDED")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def _mend(place: str) -> str:
    if place.startswith("http"):
        return "start the MLflow server, or unset MLFLOW_TRACKING_URI to use the store under the root"
    return "check that the folder is writable and not full"
