"""Compiled kernels over Arrow buffers: (data uint8[bytes], offsets int64[documents + 1]) in, arrays out.

`kernel` compiles them with the settings all of them share: they release the GIL and are compiled once a machine, and
again when a file of this folder has changed.
"""

from __future__ import annotations

from pathlib import Path

from modelyard.jit import compiler

kernel = compiler(sorted(Path(__file__).parent.glob("*.py")))
