"""How this package's kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is not finite must stay visible


def kernel(function: Callable[..., Any]) -> Any:
    """Compiled by Numba once a machine (cached on disk), without the GIL."""
    return numba.njit(nogil=True, cache=True, boundscheck=False, error_model="numpy", fastmath=_FAST)(function)
