"""Compiled kernels over Arrow buffers: (data uint8[bytes], offsets int64[documents + 1]) in, arrays out.

`kernel` is Numba's njit with the settings all of them share: they release the GIL and are compiled
once a machine. The compiled code is cached beside the sources; where the package is read-only, in
the user's cache folder, and failing that in a private folder under the system's temporary one.

Numba does not notice a changed helper in another file: helpers used across files live in `text.py`, and
a change there asks for emptied `__pycache__` folders.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_config: Any = numba.config

F = TypeVar("F", bound=Callable[..., Any])


def _cache_folder() -> str:
    """Where compiled kernels can be kept, or "" for Numba's own choice beside the sources."""
    if _config.CACHE_DIR or os.access(Path(__file__).parent, os.W_OK):
        return str(_config.CACHE_DIR)
    candidates = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelyard" / "numba"]
    candidates.append(Path(tempfile.gettempdir()) / f"modelyard-numba-{os.getuid()}")
    for folder in candidates:
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            state = folder.stat()
        except OSError:
            continue
        # The cache is code: a folder that another user could have prepared is not used.
        if state.st_uid == os.getuid() and not state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return str(folder)
    return tempfile.mkdtemp(prefix="modelyard-numba-")


_config.CACHE_DIR = _cache_folder()


def kernel(function: F) -> F:
    """Compiles `function` at first call, without the GIL, and caches the machine code on disk."""
    compiled: Any = numba.njit(nogil=True, cache=True, boundscheck=False)(function)
    return cast(F, compiled)
