"""A Ray session for a run: the cluster we were given, or a private local one with authentication on."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from modelyard.errors import ResourceError
from modelyard.recipe.schema import parse_bytes
from modelyard.storage.uri import ENDPOINTS

PACKAGE = Path(__file__).resolve().parents[1]
# Half a gigabyte holds the blocks in flight of a laptop run; Ray spills the rest to disk.
LOCAL_OBJECT_STORE = 512 * 1024 * 1024
OBJECT_STORE = "MODELYARD_OBJECT_STORE"
"""Environment variable: another size of a local Ray's object store, such as 2GiB."""
# By default Ray ends workers beyond one a CPU after a second without work, and the next task pays for a new process and
# its imports (2 to 5 CPU seconds): a test of fifty small shuffles took 43 workers with it, 6 with this.
IDLE_WORKERS = {"RAY_idle_worker_killing_time_threshold_ms": "30000"}


def start(cpus_needed: float, address: str | None = None) -> bool:
    """Connects to Ray unless already connected.

    With an address (argument or `RAY_ADDRESS`) joins that cluster and ships this package to its
    workers. Otherwise starts a local Ray of as many CPUs as the machine has, or more when one stage
    asks for more workers than that (they then share the cores).

    Returns:
        Whether this call started or joined Ray, so that the caller shuts it down.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    address = address or os.environ.get("RAY_ADDRESS")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if address is None:
        _authenticate()
    import ray

    if ray.is_initialized():
        return False
    if address is None:
        _start_local(max(os.cpu_count() or 1, int(cpus_needed + 0.999)))
        return True
    try:
        ray.init(address=address, runtime_env=runtime_environment(), logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, RuntimeError) as error:
        raise ResourceError(
            f"no Ray cluster answers: {error}",
            place=address,
            mend="check RAY_ADDRESS and RAY_AUTH_TOKEN_PATH, or unset it to run here",
        ) from error
    return True


def _start_local(cpus: int, tries: int = 2) -> None:
    import ray

    store = _object_store()
    # Ray's processes inherit our environment: workers run our interpreter, but without our sys.path.
    paths = [str(PACKAGE.parent), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    for name, value in IDLE_WORKERS.items():
        os.environ.setdefault(name, value)
    ended_by = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            # Without it Ray joins any cluster that `ray start` left on this machine, and refuses num_cpus there.
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=store,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:  # Ray raises a bare Exception when its thirty seconds for a start are over
        if "timed out during startup" not in str(error):
            raise
        if tries > 1:
            _start_local(cpus, tries - 1)
            return
        raise ResourceError(
            "Ray did not start within thirty seconds, twice",
            place="ray.init",
            mend="the machine is too busy: try again when its load is lower (uptime)",
        ) from error
    if callable(ended_by) and threading.current_thread() is threading.main_thread():
        # Ray's own handler kills its processes at once: a server would lose what its clients wait for.
        signal.signal(signal.SIGTERM, ended_by)


def _object_store() -> int:
    try:
        return int(parse_bytes(os.environ.get(OBJECT_STORE, LOCAL_OBJECT_STORE)))
    except ValueError as error:
        raise ResourceError(str(error), place=OBJECT_STORE, mend="write bytes, or 2GiB") from error


def runtime_environment() -> dict[str, Any]:
    """The runtime environment that gives workers exactly the code this driver runs, and its S3 endpoints."""
    endpoints = os.environ.get(ENDPOINTS)
    environment: dict[str, Any] = {"env_vars": {ENDPOINTS: endpoints}} if endpoints else {}
    # Inside `ray job submit` the upload of the working directory is already there; add the package.
    if os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or PACKAGE.parent.name == "platform":
        environment["py_modules"] = [str(PACKAGE)]
    return environment


def _authenticate() -> None:
    """Turns Ray's token authentication on with a token of our own, unless the person chose otherwise.

    Ray would write a token into the home directory and thereby switch authentication on for every
    later `ray start`; ours stays in its own file.
    """
    # Ray reads these when it is imported: once it is, a change would split driver and servers.
    if "RAY_AUTH_MODE" in os.environ or "ray" in sys.modules:
        return
    folder = Path(tempfile.gettempdir()) / f"modelyard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    token = folder / "ray-token"
    if not token.exists():
        temporary = folder / f"ray-token.{os.getpid()}"
        temporary.touch(mode=0o600)
        temporary.write_text(secrets.token_hex(32))
        temporary.replace(token)
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def stop() -> None:
    """Disconnects; a local Ray ends with it."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
