"""How this package compiles its Numba kernels: once a machine, and again when a source they are made of has changed.

The compiled code is cached beside the sources; where the package is read-only, in the user's cache folder, and failing
that in a private folder under the system's temporary one.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

_config: Any = numba.config

F = TypeVar("F", bound=Callable[..., Any])


def compiler(sources: Iterable[Path], **options: Any) -> Callable[[F], F]:
    """A decorator that compiles a function at its first call, to run without the GIL, and caches the machine code.

    Args:
        sources: files of kernels that call each other or take in each other's constants. When one of them changes, all
            are compiled again: Numba itself looks only at a function's own file and goes on with old code of the rest.
        options: of `numba.njit`.
    """
    options["no_cfunc_wrapper"] = True  # a way in from C, for which LLVM would generate every function once more
    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()

    def kernel(function: F) -> F:
        compiled: Any = numba.njit(nogil=True, cache=True, boundscheck=False, **options)(function)
        compiled._cache._cache_file._source_stamp = stamp
        return cast(F, compiled)

    return kernel


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
