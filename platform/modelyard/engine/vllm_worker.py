"""What this project adds to vLLM's workers: new weights by files, and an end with their owner.

Runs in vLLM's processes; imports little.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

import psutil
from safetensors import safe_open

from modelyard.engine.vllm_options import OWNER


class Worker:
    """Mixed into vLLM's worker class (its `worker_extension_cls`)."""

    reload_weights: Callable[..., None]

    def take_weights(self, files: list[str]) -> str:
        """Replaces all of the model's tensors by those of safetensors files, by Hugging Face names.

        Says what failed; raised here it would end vLLM. vLLM's own way of loading again knows the forms its layers
        have been packed into, and LoRA's wrappers around them.
        """
        try:
            self.reload_weights(weights_iterator=_tensors(files))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def _tensors(files: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                yield name, handle.get_tensor(name)


def _end_with(owner: int, engine: int) -> None:
    """Ends this process and `engine` once `owner` is gone.

    An actor of Ray that is killed says no farewell, and vLLM's engine process waits for it for ever with all its
    memory.
    """
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(owner)
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    if engine != owner:
        with suppress(ProcessLookupError):
            os.kill(engine, signal.SIGKILL)
    os._exit(1)


def _watch() -> None:
    """Begins as vLLM imports this module for its worker: from then on the owner may end at any time."""
    owner, parent = int(os.environ.get(OWNER, 0)), multiprocessing.parent_process()
    if owner and owner != os.getpid() and parent is not None and parent.pid is not None:
        threading.Thread(target=_end_with, args=(owner, parent.pid), name="owner", daemon=True).start()


_watch()
