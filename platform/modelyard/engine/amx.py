"""Products of bfloat16 by AMX: x is rounded once a product, its rows past each panel of the matrix in twos of sixteen.

What bounds them is memory. A panel of weights streams past once for all rows, and sums go straight to where they are
wanted. The largest result of a decoder, gate and up of its feed-forward network, is not written at all: a panel of each
meets in the nearest cache, and only what the activation makes of them leaves it, already rounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from modelyard.engine.jit import kernel, part
from modelyard.engine.tiles import BIAS, COLUMNS, DEPTH, PANEL, ROWS, WEIGHTS, amx_begin, amx_end, amx_tile
from modelyard.engine.vectors import finish_line, round_line, silu_rounded
from modelyard.lanes import address, bytes_at, clear, field, stack

HIGH = 32
"""Rows of x a tile takes: two registers of 16."""

TOGETHER = 256
"""Rows of x that every panel is multiplied with before the next panel: they and their results stay in the L2 cache."""

_amx_16, _amx_32 = amx_tile(1), amx_tile(2)
_layout_room, _tile_room = stack(64), stack(HIGH * PANEL * 4)


def empty_rows(count: int, depth: int, width: int) -> np.ndarray:
    """Room for `width` columns of bfloat16 as `round_rows` lays them out: uint16 [count, depth], zero behind them.

    It begins a cache line: rows across two load at a third of the speed.
    """
    room = np.empty(count * depth + 32, np.uint16)
    first = (-room.ctypes.data) % 64 // 2
    values = room[first : first + count * depth].reshape(count, depth)
    values[:, width:] = 0
    return values


@part
def _begin_rows(layout: int, rows: int) -> None:
    """Palette 1: lines of 64 bytes; sums in 0 and 1 and x in 4 have the first 16 of `rows`, sums in 2 and 3 and x in 5
    the rest, weights in 6 and 7 sixteen.
    """
    clear(layout, 64)
    fields = carray(bytes_at(layout), (64,))
    fields[0] = 1
    upper = min(rows, 16)
    for register in range(8):
        high = upper if register in (0, 1, 4) else 16 if register > 5 else max(1, rows - 16)
        fields[16 + 2 * register] = 64
        fields[48 + register] = high
    amx_begin(layout)


@part
def _tile(rows: int, w: int, x: int, depth: int, to: int, step: int) -> None:
    if rows > 16:
        _amx_32(w, x, depth * 2, depth // 32, to, step)
    else:
        _amx_16(w, x, depth * 2, depth // 32, to, step)


@part
def round_to(m: int, x: int, stride: int, count: int, out: int) -> None:
    """Rows of float32 as the bfloat16 that a matrix is multiplied with: [count, DEPTH], zero behind its columns.

    m: address of a descriptor. stride: bytes from a row of x to the next. out: where a cache line begins.
    """
    columns, depth = field(m, COLUMNS), field(m, DEPTH)
    for t in range(count):
        line = out + t * depth * 2
        round_line(x + t * stride, line, columns)
        clear(line + columns * 2, (depth - columns) * 2)


@part
def multiply(m: int, values: int, count: int, y: int, step: int, first: int, last: int) -> None:
    """As `products.run`, of rounded rows."""
    depth, rows, bias = field(m, DEPTH), field(m, ROWS), field(m, BIAS)
    layout, aside = _layout_room(), _tile_room()
    begun = 0
    for start in range(0, count, TOGETHER):
        stop = min(start + TOGETHER, count)
        for panel in range(2 * first, min(2 * last, (rows + PANEL - 1) // PANEL)):
            w, column = field(m, WEIGHTS) + panel * PANEL * depth * 2, panel * PANEL
            width = min(PANEL, rows - column)
            for t in range(start, stop, HIGH):
                done = min(HIGH, stop - t)
                if done != begun:
                    _begin_rows(layout, done)
                    begun = done
                x, to = values + t * depth * 2, y + t * step + column * 4
                if width == PANEL and bias == 0:
                    _tile(done, w, x, depth, to, step)
                    continue
                _tile(done, w, x, depth, aside, PANEL * 4)
                behind = bias + column * 4 if bias else 0
                for i in range(done):
                    finish_line(aside + i * PANEL * 4, 0, behind, to + i * step, width)
    amx_end()


def fits(m: np.ndarray) -> bool:
    """Whether `gate` can compute with a matrix of gate and up: halves are whole panels, without a bias."""
    return bool(m[BIAS] == 0 and m[ROWS] % (2 * PANEL) == 0)


@part
def gate_rows(m: int, values: int, count: int, out: int, step: int, first: int, last: int) -> None:
    """As `gate`, of addresses. step: bytes from a row of out to the next."""
    depth, half = field(m, DEPTH), field(m, ROWS) // 2 // PANEL
    layout, gates, ups = _layout_room(), _tile_room(), _tile_room()
    begun = 0
    for start in range(0, count, TOGETHER):
        stop = min(start + TOGETHER, count)
        for panel in range(first, last):
            w, column = field(m, WEIGHTS) + panel * PANEL * depth * 2, panel * PANEL
            for t in range(start, stop, HIGH):
                done = min(HIGH, stop - t)
                if done != begun:
                    _begin_rows(layout, done)
                    begun = done
                x = values + t * depth * 2
                _tile(done, w, x, depth, gates, PANEL * 4)
                _tile(done, w + half * PANEL * depth * 2, x, depth, ups, PANEL * 4)
                for i in range(done):
                    line = i * PANEL * 4
                    silu_rounded(gates + line, ups + line, out + (t + i) * step + column * 2, PANEL)
    amx_end()


@part
def product_rows(
    form: Any, m: int, x: int, stride: int, count: int, y: int, step: int, first: int, last: int, room: int
) -> None:
    """See `products.run`."""
    round_to(m, x, stride, count, room)
    multiply(m, room, count, y, step, first, last)


@part
def feed_forward(
    form: Any, up: int, down: int, x: int, count: int, hidden: int, wide: int, active: int, y: int, room: int
) -> None:
    """See `step.feed_forward`. What lies between the products is written, to `wide`, only where `up` does not fit."""
    half, depth, none = field(up, ROWS) // 2, field(down, DEPTH), np.int64(0)
    round_to(up, x, hidden * 4, count, room)
    if field(up, BIAS) == 0 and half % PANEL == 0:
        gate_rows(up, room, count, active, depth * 2, none, half // PANEL)
    else:
        multiply(up, room, count, wide, half * 8, none, (2 * half + 2 * PANEL - 1) // (2 * PANEL))
        for t in range(count):
            row, line = wide + t * half * 8, active + t * depth * 2
            silu_rounded(row, row + half * 4, line, half)
            clear(line + half * 2, (depth - half) * 2)
    multiply(down, active, count, y, hidden * 4, none, (field(down, ROWS) + 2 * PANEL - 1) // (2 * PANEL))


@kernel
def round_rows(m: Any, x: Any, values: Any) -> None:
    """Rounds x, float32 [T, COLUMNS], to bfloat16 in uint16 [T, DEPTH]. m: a descriptor."""
    round_to(address(m), address(x), x.strides[0], x.shape[0], address(values))


@kernel
def gate(m: Any, values: Any, out: Any, first: int, last: int) -> None:
    """silu(x G^T) * (x U^T), where G and U are halves of a matrix that `fits`, for panels `first .. last-1` of each.

    values: rounded x, uint16 [T, DEPTH]. out: as bfloat16 in uint16 [T, ROWS / 2].
    """
    gate_rows(address(m), address(values), values.shape[0], address(out), out.strides[0], first, last)


@kernel
def multiply_rounded(m: Any, values: Any, y: Any, first: int, last: int) -> None:
    """As `products.product`, of rounded x, uint16 [T, DEPTH]."""
    multiply(address(m), address(values), values.shape[0], address(y), y.strides[0], first, last)
