"""Products of bfloat16 by AMX: x is rounded once a product, its rows past each panel of the matrix in twos of sixteen.

What bounds them is memory. A panel of weights streams past once for all rows, and sums go straight to where they are
wanted. The largest result of a decoder, gate and up of its feed-forward network, is not written at all: a panel of each
meets in the nearest cache, and only what the activation makes of them leaves it, already rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from modelyard.engine.jit import kernel
from modelyard.engine.tiles import BIAS, DEPTH, PANEL, ROWS, WEIGHTS, amx_begin, amx_end, amx_tile, floats_at
from modelyard.engine.vectors import round_line, silu_rounded

HIGH = 32
"""Rows of x a tile takes: two registers of 16."""

TOGETHER = 256
"""Rows of x that every panel is multiplied with before the next panel: they and their results stay in the L2 cache."""

_amx_16, _amx_32 = amx_tile(1), amx_tile(2)


@kernel
def _begin_rows(layout: Any, rows: int) -> None:
    """Palette 1: lines of 64 bytes; sums in 0 and 1 and x in 4 have the first 16 of `rows`, sums in 2 and 3 and x in 5
    the rest, weights in 6 and 7 sixteen.
    """
    layout[:] = np.uint8(0)
    layout[0] = np.uint8(1)
    upper = min(rows, 16)
    for register in range(8):
        high = upper if register in (0, 1, 4) else 16 if register > 5 else max(1, rows - 16)
        layout[16 + 2 * register] = np.uint8(64)
        layout[48 + register] = np.uint8(high)
    amx_begin(layout.ctypes.data)


@kernel
def rounded(x: Any, depth: int) -> Any:
    """float32 [T, K] as bfloat16 in uint16 [T, depth], zero behind K.

    It begins a cache line: rows across two load at a third of the speed.
    """
    count = x.shape[0]
    values = empty_rows(count, depth, x.shape[1])
    for t in range(count):
        round_line(x[t].ctypes.data, values[t].ctypes.data, x.shape[1])
    return values


@kernel
def _lines(count: int, width: int, kind: Any) -> Any:
    """An array [count, width] of a type that begins a cache line. What it holds is undefined."""
    room = np.empty(count * width + 32, kind)
    first = (-room.ctypes.data) % 64 // room.itemsize
    return room[first : first + count * width].reshape(count, width)


@kernel
def empty_rows(count: int, depth: int, width: int) -> Any:
    """Room for `width` columns of bfloat16 as `rounded` lays them out: uint16 [count, depth], zero behind them."""
    values = _lines(count, depth, np.uint16)
    values[:, width:] = np.uint16(0)
    return values


@kernel
def _tile(rows: int, w: int, x: int, depth: int, to: int, step: int) -> None:
    if rows > 16:
        _amx_32(w, x, depth * 2, depth // 32, to, step)
    else:
        _amx_16(w, x, depth * 2, depth // 32, to, step)


@kernel
def multiply(m: Any, x: Any, y: Any, first: int, last: int) -> None:
    """See `products.product`."""
    multiply_rounded(m, rounded(x, m[DEPTH]), y, first, last)


@kernel
def multiply_rounded(m: Any, values: Any, y: Any, first: int, last: int) -> None:
    """As `multiply`, of rows that are the caller's: Numba frees an array whose address alone is used any more."""
    depth, count, rows, step = m[DEPTH], values.shape[0], m[ROWS], y.strides[0]
    aside = _lines(HIGH, PANEL, np.float32)
    layout = np.empty(64, np.uint8)
    bias = carray(floats_at(m[BIAS]), (rows if m[BIAS] != 0 else 0,))
    begun = 0
    for start in range(0, count, TOGETHER):
        stop = min(start + TOGETHER, count)
        for panel in range(2 * first, min(2 * last, (rows + PANEL - 1) // PANEL)):
            w, column = m[WEIGHTS] + panel * PANEL * depth * 2, panel * PANEL
            whole = column + PANEL <= rows and m[BIAS] == 0
            for t in range(start, stop, HIGH):
                done = min(HIGH, stop - t)
                if done != begun:
                    _begin_rows(layout, done)
                    begun = done
                x = values.ctypes.data + t * depth * 2
                if whole:
                    _tile(done, w, x, depth, y.ctypes.data + t * step + column * 4, step)
                    continue
                _tile(done, w, x, depth, aside.ctypes.data, PANEL * 4)
                for i in range(done):
                    for n in range(min(PANEL, rows - column)):
                        y[t + i, column + n] = aside[i, n]
                        if m[BIAS] != 0:
                            y[t + i, column + n] += bias[column + n]
    amx_end()


@kernel
def fits(m: Any) -> Any:
    """Whether `gate` can compute with a matrix of gate and up: halves are whole panels, without a bias."""
    return m[BIAS] == 0 and m[ROWS] % (2 * PANEL) == 0


@kernel
def gate(m: Any, values: Any, out: Any, first: int, last: int) -> None:
    """silu(x G^T) * (x U^T), where G and U are halves of a matrix that `fits`, for panels `first .. last-1` of each.

    values: rounded x, uint16 [T, DEPTH]. out: as bfloat16 in uint16 [T, ROWS / 2].
    """
    depth, count = m[DEPTH], values.shape[0]
    half = m[ROWS] // 2 // PANEL
    gates, ups = _lines(HIGH, PANEL, np.float32), _lines(HIGH, PANEL, np.float32)
    layout = np.empty(64, np.uint8)
    begun = 0
    for start in range(0, count, TOGETHER):
        stop = min(start + TOGETHER, count)
        for panel in range(first, last):
            w, column = m[WEIGHTS] + panel * PANEL * depth * 2, panel * PANEL
            for t in range(start, stop, HIGH):
                done = min(HIGH, stop - t)
                if done != begun:
                    _begin_rows(layout, done)
                    begun = done
                x = values.ctypes.data + t * depth * 2
                _tile(done, w, x, depth, gates.ctypes.data, PANEL * 4)
                _tile(done, w + half * PANEL * depth * 2, x, depth, ups.ctypes.data, PANEL * 4)
                for i in range(done):
                    silu_rounded(gates[i].ctypes.data, ups[i].ctypes.data, out[t + i, column:].ctypes.data, PANEL)
    amx_end()


@kernel
def feed_forward(up: Any, down: Any, x: Any, y: Any) -> None:
    """y = W_down (silu(x G^T) * (x U^T)) for a matrix `up` that `fits`. x: float32 [T, K]; y: float32 [T, rows]."""
    active = empty_rows(x.shape[0], down[DEPTH], up[ROWS] // 2)
    gate(up, rounded(x, up[DEPTH]), active, 0, up[ROWS] // 2 // PANEL)
    multiply_rounded(down, active, y, 0, (down[ROWS] + 2 * PANEL - 1) // (2 * PANEL))
