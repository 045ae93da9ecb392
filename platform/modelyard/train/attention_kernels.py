"""Kernels of causal attention over whole sequences on a CPU, forward and backward, in float32.

Scores of a block of queries are made, used and forgotten while they lie in the nearest caches, and only over keys that
some query of the block sees (FlashAttention, arXiv 2205.14135 and 2307.08691, by rows of keys as long as the sequence).
Backward makes them again from the logarithm of each query's sum. Every product runs in registers over sixteen lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from modelyard import lanes
from modelyard.jit import compiler
from modelyard.lanes import (
    FLOAT,
    FLOATS,
    I64,
    INTS,
    LANES,
    add_up,
    address,
    at,
    call,
    clear,
    each,
    everywhere,
    exp,
    fixed,
    floats,
    floats_at,
    fma,
    integers_at,
    load,
    made_intrinsic,
    slots,
)

_FAST = {"reassoc", "contract", "arcp", "nsz"}  # not nnan or ninf: what is not finite must stay visible
_SOURCES = [Path(__file__), Path(lanes.__file__)]
_kernel: Callable[[Callable[..., Any]], Any] = compiler(_SOURCES, error_model="numpy", fastmath=_FAST)
_part: Callable[[Callable[..., Any]], Any] = compiler(
    _SOURCES, error_model="numpy", fastmath=_FAST, no_cpython_wrapper=True
)

_QUERIES = 48
"""Queries of a block: eight tiles of rows."""

_DEPTH = 96
"""Rows of the right matrix that a pass of tiles shares: they stay in the first cache."""


_FOUR, _ONE = (0, 0, 0, 0), (0,)
"""Vectors of a panel. Kernels are compiled for the length of such a tuple; what it holds is nothing."""


def _tile(rows: int) -> Any:
    """tile(vectors, A, am, ak, B, bk, C, cm, depth, add): C [rows, 16 of each of vectors] = (C if add) + sum over k of
    A[m, k] B[k].

    am, ak, bk, cm: bytes from a row or column to the next.
    """

    @made_intrinsic
    def tile(
        typingctx: Any, vectors: Any, a: Any, am: Any, ak: Any, b: Any, bk: Any, c: Any, cm: Any, depth: Any, add: Any
    ) -> Any:
        wide = len(vectors)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, a, am, ak, b, bk, c, cm, depth, add = args
            held = [slots(builder, wide, floats(0.0)) for _ in range(rows)]
            places = [
                [builder.add(builder.add(c, builder.mul(cm, fixed(m))), fixed(64 * w)) for w in range(wide)]
                for m in range(rows)
            ]
            with builder.if_then(builder.icmp_signed("!=", add, fixed(0))):
                for m in range(rows):
                    for w in range(wide):
                        builder.store(load(builder, places[m][w], FLOATS), held[m][w])
            starts = [builder.add(a, builder.mul(am, fixed(m))) for m in range(rows)]
            with cgutils.for_range(builder, depth, intp=I64) as loop:
                line = builder.add(b, builder.mul(bk, loop.index))
                column = builder.mul(ak, loop.index)
                numbers = [load(builder, builder.add(line, fixed(64 * w)), FLOATS) for w in range(wide)]
                for m in range(rows):
                    one = everywhere(builder, builder.load(at(builder, starts[m], column, FLOAT)))
                    for w in range(wide):
                        builder.store(fma(builder, one, numbers[w], builder.load(held[m][w])), held[m][w])
            for line, sums in zip(places, held, strict=True):
                for place, total in zip(line, sums, strict=True):
                    where = builder.inttoptr(place, FLOATS.as_pointer())
                    builder.store(builder.load(total), where, align=4)
            return context.get_dummy_value()

        return types.void(vectors, *(types.int64,) * 9), generate

    return tile


_tile_6, _tile_4, _tile_2, _tile_1 = (_tile(rows) for rows in (6, 4, 2, 1))


@_part
def _panel(
    vectors: Any, a: int, am: int, ak: int, b: int, bk: int, c: int, cm: int, rows: int, depth: int, add: int
) -> None:
    m = 0
    while m + 6 <= rows:
        _tile_6(vectors, a + m * am, am, ak, b, bk, c + m * cm, cm, depth, add)
        m += 6
    if m + 4 <= rows:
        _tile_4(vectors, a + m * am, am, ak, b, bk, c + m * cm, cm, depth, add)
        m += 4
    if m + 2 <= rows:
        _tile_2(vectors, a + m * am, am, ak, b, bk, c + m * cm, cm, depth, add)
        m += 2
    if m < rows:
        _tile_1(vectors, a + m * am, am, ak, b, bk, c + m * cm, cm, depth, add)


@_part
def _product(
    a: int, am: int, ak: int, b: int, bk: int, c: int, cm: int, rows: int, columns: int, depth: int, add: int
) -> None:
    """C [rows, columns] = (C if add) + A B; columns is a multiple of sixteen."""
    for k in range(0, depth, _DEPTH):
        some, more = min(_DEPTH, depth - k), 1 if k else add
        left, n = a + k * ak, 0
        while n + 64 <= columns:
            _panel(_FOUR, left, am, ak, b + k * bk + n * 4, bk, c + n * 4, cm, rows, some, more)
            n += 64
        while n < columns:
            _panel(_ONE, left, am, ak, b + k * bk + n * 4, bk, c + n * 4, cm, rows, some, more)
            n += 16


@made_intrinsic
def _highest(typingctx: Any, row: Any, count: Any) -> Any:
    """The largest of a row of float32."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, number = args
        (best,) = slots(builder, 1, floats(float("-inf")))
        with each(builder, number) as row:
            x = row.load(start, float("-inf"))
            builder.store(call(builder, f"llvm.maxnum.v{LANES}f32", FLOATS, x, builder.load(best)), best)
        return call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, builder.load(best))

    return types.float32(types.int64, types.int64), generate


@made_intrinsic
def _powers(typingctx: Any, row: Any, count: Any, scale: Any, less: Any) -> Any:
    """_powers(row, count, scale, less): x = exp(scale x - less) of a row of float32, in place; their sum."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, number, factor, lower = args
        (total,) = slots(builder, 1, floats(0.0))
        factors, lowers = everywhere(builder, factor), everywhere(builder, builder.fneg(lower))
        with each(builder, number) as row:
            power = exp(builder, fma(builder, row.load(start), factors, lowers))
            row.store(start, power)
            builder.store(builder.fadd(builder.load(total), builder.select(row.mask, power, floats(0.0))), total)
        return add_up(builder, builder.load(total))

    return types.float32(types.int64, types.int64, types.float32, types.float32), generate


@made_intrinsic
def _scaled(typingctx: Any, row: Any, count: Any, factor: Any) -> Any:
    """_scaled(row, count, factor): a row of float32 times a factor, in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        start, number, factor = args
        factors = everywhere(builder, factor)
        with each(builder, number) as row:
            row.store(start, builder.fmul(row.load(start), factors))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate


@made_intrinsic
def _slope_line(typingctx: Any, p: Any, d: Any, count: Any, scale: Any) -> Any:
    """_slope_line(p, d, count, scale): d = p (d - sum of p d) scale."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        shares, slopes, number, factor = args
        (total,) = slots(builder, 1, floats(0.0))
        with each(builder, number) as row:
            builder.store(fma(builder, row.load(shares), row.load(slopes), builder.load(total)), total)
        mean, factors = everywhere(builder, add_up(builder, builder.load(total))), everywhere(builder, factor)
        with each(builder, number) as row:
            value = builder.fmul(row.load(shares), builder.fsub(row.load(slopes), mean))
            row.store(slopes, builder.fmul(value, factors))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.float32), generate


@made_intrinsic
def _turn(typingctx: Any, source: Any, line: Any, target: Any, pitch: Any) -> Any:
    """_turn(source, line, target, pitch): 16 x 16 numbers transposed; line, pitch: bytes from a row to the next."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, line, target, pitch = args
        rows = [load(builder, builder.add(source, builder.mul(line, fixed(m))), FLOATS) for m in range(LANES)]
        for step in (1, 2, 4, 8):
            # Of rows m and m + step the squares off the diagonal change places.
            left, right = (ir.Constant(INTS, order) for order in (
                [lane if not lane & step else LANES + lane - step for lane in range(LANES)],
                [lane + step if not lane & step else LANES + lane for lane in range(LANES)],
            ))  # fmt: skip
            for m in (m for m in range(LANES) if not m & step):
                a, b = rows[m], rows[m + step]
                rows[m], rows[m + step] = builder.shuffle_vector(a, b, left), builder.shuffle_vector(a, b, right)
        for m, row in enumerate(rows):
            where = builder.add(target, builder.mul(pitch, fixed(m)))
            builder.store(row, builder.inttoptr(where, FLOATS.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 4), generate


@_part
def _transposed(source: int, line: int, rows: int, columns: int, target: int, pitch: int) -> None:
    """target [columns, pitch / 4] = source [rows, columns]^T; line, pitch: bytes of a row; columns: sixteens."""
    whole = rows // 16 * 16
    for j in range(0, columns, 16):
        for i in range(0, whole, 16):
            _turn(source + i * line + j * 4, line, target + j * pitch + i * 4, pitch)
    for i in range(whole, rows):
        numbers = floats_at(source + i * line)
        for j in range(columns):
            floats_at(target + j * pitch)[i] = numbers[j]


@_part
def _begin(starts: int, i: int) -> int:
    return integers_at(starts)[i] if starts else 0


@_part
def _shares(
    q: int, line: int, keys: int, pitch: int, i: int, rows: int, low: int, wide: int, width: int, scale: float,
    starts: int, s: int, sizes: int, sums: int,
) -> None:  # fmt: skip
    """exp(scores - size) of `rows` queries from i over `wide` keys from low; zeros where a query does not see.

    keys: transposed, `pitch` bytes a line, as s. sizes: of each query; 0 = the logarithm of its sum is known, else
    `sums` take up what its exponentials, less the largest, add up to.
    """
    _product(q + i * line, line, 4, keys + low * 4, pitch, s, pitch, rows, wide, width, 0)
    logs = floats_at(sizes)
    for r in range(rows):
        first = _begin(starts, i + r) - low
        count, row = i + r + 1 - low - first, s + r * pitch
        if first:
            clear(row, first * 4)
        here = row + first * 4
        if sums:
            top = _highest(here, count) * np.float32(scale)
            total = _powers(here, count, np.float32(scale), top)
            logs[i + r] = top + np.log(total)
            floats_at(sums)[r] = total
        else:
            _powers(here, count, np.float32(scale), logs[i + r])
        if first + count < wide:
            clear(here + count * 4, (wide - first - count) * 4)


@_part
def _seen(starts: int, i: int, rows: int) -> tuple[int, int]:
    """First key, a multiple of sixteen, that queries from i see, and the number of keys from there to the last."""
    low = i
    for r in range(rows):
        low = min(low, _begin(starts, i + r))
    low = low // LANES * LANES
    return low, i + rows - low


@_part
def _pitch(length: int) -> int:
    """Numbers of a line of keys: an odd number of cache lines, so that a column does not fall on few places of it."""
    return ((length + LANES - 1) // LANES | 1) * LANES


@_kernel
def forward(
    q: Any, k: Any, v: Any, o: Any, sizes: int, starts: int, first: int, last: int, heads: int, shared: int,
    length: int, width: int, scale: float,
) -> None:  # fmt: skip
    """Attention of the tasks first .. last-1, of which a sequence has one for each of its `shared` heads of keys.

    Args:
        q: address of float32 [B, heads, L, D], and bytes from a position, a head, a sequence to the next. D = `width`
            is a multiple of 16 and follows itself in memory.
        k: as q, [B, shared, L, D].
        v: as k.
        o: as q, for the result.
        sizes: address of float32 [B, heads, L]: logarithms of the sums of exponentials, for `backward`.
        starts: address of int32 [B, L], the first position that each one sees, at most its own; 0 = it sees all up to
            its own.
        first: first task.
        last: task after the last.
        heads: query heads.
        shared: heads of keys.
        length: L.
        width: D.
        scale: of the scores.
    """
    group, padded = heads // shared, _pitch(length)
    pitch = padded * 4
    room = np.zeros((width + _QUERIES + 1, padded), np.float32)
    few = np.zeros(_QUERIES, np.float32)
    keys, sums = address(room), address(few)
    s = keys + width * pitch
    for task in range(first, last):
        b, h = task // shared, task % shared
        begins = starts + b * length * 4 if starts else 0
        _transposed(k[0] + b * k[3] + h * k[2], k[1], length, width, keys, pitch)
        values = v[0] + b * v[3] + h * v[2]
        for n in range(h * group, (h + 1) * group):
            query, out = q[0] + b * q[3] + n * q[2], o[0] + b * o[3] + n * o[2]
            logs = sizes + (b * heads + n) * length * 4
            for i in range(0, length, _QUERIES):
                rows = min(_QUERIES, length - i)
                low, seen = _seen(begins, i, rows)
                wide = (seen + LANES - 1) // LANES * LANES
                _shares(query, q[1], keys, pitch, i, rows, low, wide, width, scale, begins, s, logs, sums)
                _product(s, pitch, 4, values + low * v[1], v[1], out + i * o[1], o[1], rows, width, seen, 0)
                for r in range(rows):
                    _scaled(out + (i + r) * o[1], width, np.float32(1.0) / few[r])
    room[0, 0] = 0.0  # an array whose address alone is used would be freed


@_kernel
def backward(
    q: Any, k: Any, v: Any, d: Any, dq: Any, dk: Any, dv: Any, sizes: int, starts: int, first: int, last: int,
    heads: int, shared: int, length: int, width: int, scale: float,
) -> None:  # fmt: skip
    """As `forward`, the gradients for that of its result, `d`: dq as q, and dk, dv as k, which begin as zeros."""
    group, padded = heads // shared, _pitch(length)
    pitch = padded * 4
    room = np.zeros((2 * width + 2 * _QUERIES, padded), np.float32)
    keys = address(room)
    values = keys + width * pitch
    s = values + width * pitch
    t = s + _QUERIES * pitch
    for task in range(first, last):
        b, h = task // shared, task % shared
        begins = starts + b * length * 4 if starts else 0
        key = k[0] + b * k[3] + h * k[2]
        _transposed(key, k[1], length, width, keys, pitch)
        _transposed(v[0] + b * v[3] + h * v[2], v[1], length, width, values, pitch)
        to_key, to_value = dk[0] + b * dk[3] + h * dk[2], dv[0] + b * dv[3] + h * dv[2]
        for n in range(h * group, (h + 1) * group):
            query, slope = q[0] + b * q[3] + n * q[2], d[0] + b * d[3] + n * d[2]
            to_query, logs = dq[0] + b * dq[3] + n * dq[2], sizes + (b * heads + n) * length * 4
            for i in range(0, length, _QUERIES):
                rows = min(_QUERIES, length - i)
                low, seen = _seen(begins, i, rows)
                wide = (seen + LANES - 1) // LANES * LANES
                _shares(query, q[1], keys, pitch, i, rows, low, wide, width, scale, begins, s, logs, 0)
                # P of softmax: dV = P^T dO, dP = dO V^T, dS = P (dP - sum P dP), dQ = dS K, dK = dS^T Q.
                near = slope + i * d[1]
                _product(near, d[1], 4, values + low * 4, pitch, t, pitch, rows, wide, width, 0)
                _product(s, 4, pitch, near, d[1], to_value + low * dv[1], dv[1], seen, width, rows, 1)
                for r in range(rows):
                    _slope_line(s + r * pitch, t + r * pitch, wide, np.float32(scale))
                _product(t, pitch, 4, key + low * k[1], k[1], to_query + i * dq[1], dq[1], rows, width, seen, 0)
                _product(t, 4, pitch, query + i * q[1], q[1], to_key + low * dk[1], dk[1], seen, width, rows, 1)
    room[0, 0] = 0.0
