"""How this package's kernels are compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is not finite must stay visible
_FILES = ("jit.py", "kernels.py", "products.py", "step.py", "tiles.py")
STAMP = hashlib.sha256(b"".join((Path(__file__).parent / name).read_bytes() for name in _FILES)).hexdigest()
"""Of all sources of kernels: they call each other across files."""


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled by Numba once a machine (cached on disk), without the GIL."""
    compiled: Any = numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath=_FAST)(function)
    # Numba compiles again when the function's own file has changed, not when one has whose functions it has taken in.
    compiled._cache._cache_file._source_stamp = STAMP
    return compiled
