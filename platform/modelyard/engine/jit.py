"""How this package's kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from modelyard.jit import compiler

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is not finite must stay visible
_FILES = (
    "../lanes.py", "amx.py", "attention.py", "jit.py", "kernels.py", "products.py", "step.py", "tiles.py", "vectors.py",
)  # fmt: skip
"""All sources of kernels: they call each other across files."""

_SOURCES = [Path(__file__).parent / name for name in _FILES]

kernel: Callable[[Callable[..., Any]], Any] = compiler(_SOURCES, error_model="numpy", fastmath=_FAST)

part: Callable[[Callable[..., Any]], Any] = compiler(
    _SOURCES, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True
)
"""As `kernel`, for what kernels alone call: without a way in from Python it compiles in half the time."""
