"""How this package's kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelyard.jit import compiler

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is not finite must stay visible
_FILES = ("amx.py", "jit.py", "kernels.py", "products.py", "step.py", "tiles.py", "vectors.py")
"""All sources of kernels: they call each other across files."""

kernel: Callable[[Callable[..., Any]], Any] = compiler(
    (Path(__file__).parent / name for name in _FILES), error_model="numpy", fastmath=_FAST
)
