"""Attention of a few queries over cached keys and values, read once for all query heads that share them.

Keys and values are float32, or bfloat16 as its upper half: two neighbours are one 32-bit lane, which a shift and a mask
widen exactly, so that only the memory is half. Tiles are told which by the type of the cache's numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types

from modelyard.engine.jit import kernel, part
from modelyard.engine.vectors import softmax_line
from modelyard.lanes import (
    FLOAT,
    FLOATS,
    I8,
    I64,
    INTS,
    LANES,
    add_up,
    address,
    at,
    everywhere,
    first_lanes,
    fixed,
    floats,
    fma,
    ints,
    load,
    made_intrinsic,
    prefetch,
    slots,
    store,
)

_TILE = 16
"""Keys of a tile of scores: as many sums as registers hold."""

_WIDE = 64
"""Columns of a tile of mixed values."""

_AHEAD = 16
"""Lines that are asked for early: sequences are too short for the CPU to see the stream in time."""

_EVEN, _ODD = (ir.Constant(INTS, list(range(start, 2 * LANES, 2))) for start in (0, 1))
_LOWER, _UPPER = (ir.Constant(INTS, [n for i in range(start, start + 8) for n in (i, LANES + i)]) for start in (0, 8))
"""Of two vectors: their even and odd lanes apart; lanes of each in turn, the first sixteen and the rest."""


def _is_half(kind: Any) -> bool:
    return bool(kind.dtype == types.uint16)


def _halves(builder: Any, pairs: Any) -> tuple[Any, Any]:
    """Even and odd numbers of 32 in bfloat16, as float32."""
    even = builder.shl(pairs, ints(16))
    odd = builder.and_(pairs, ints(-65536))
    return builder.bitcast(even, FLOATS), builder.bitcast(odd, FLOATS)


def _dot_tile(rows: int) -> Any:
    """tile(kind, K, Q, stride, width, S): float32 products of Q with `rows` rows of K, 1 or 16.

    stride: bytes from a row of K to the next. Rows of bfloat16 have an even number of columns.
    """

    def typed(typingctx: Any, kind: Any, k: Any, q: Any, stride: Any, width: Any, sums: Any) -> Any:
        half = _is_half(kind)
        step = 2 * LANES if half else LANES

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, keys, query, line, count, to = args
            held = slots(builder, rows, floats(0.0))

            def columns(first: Any, left: Any | None) -> None:
                asked = _queries(builder, query, first, half, left)
                mask = None if left is None else first_lanes(builder, builder.lshr(left, fixed(1)) if half else left)
                for m, slot in enumerate(held):
                    column = builder.mul(first, fixed(2 if half else 4))
                    row = builder.add(builder.add(keys, builder.mul(line, fixed(m))), column)
                    if left is None and rows > 1:
                        prefetch(builder, at(builder, row, builder.mul(line, fixed(rows)), I8))
                    key = load(builder, row, INTS if half else FLOATS, mask)
                    for one, other in zip(asked, _halves(builder, key) if half else (key,), strict=True):
                        builder.store(fma(builder, one, other, builder.load(slot)), slot)

            whole = builder.sdiv(count, fixed(step))
            with cgutils.for_range(builder, whole, intp=I64) as loop:
                columns(builder.mul(loop.index, fixed(step)), None)
            begun = builder.mul(whole, fixed(step))
            left = builder.sub(count, begun)
            with builder.if_then(builder.icmp_signed(">", left, fixed(0)), likely=False):
                columns(begun, left)
            if rows == 1:
                builder.store(add_up(builder, builder.load(held[0])), at(builder, to, fixed(0), FLOAT))
            else:
                builder.store(_add_up_each(builder, held), at(builder, to, fixed(0), FLOATS), align=4)
            return context.get_dummy_value()

        return types.void(kind, *(types.int64,) * 5), generate

    return made_intrinsic(typed)


def _queries(builder: Any, query: Any, first: Any, half: bool, left: Any | None) -> tuple[Any, ...]:
    """Columns of a query from `first`, in the order of a line of keys. left: how many there are, None = enough."""
    where = builder.add(query, builder.mul(first, fixed(4)))
    if not half:
        return (load(builder, where, FLOATS, None if left is None else first_lanes(builder, left)),)
    masks = [None, None]
    if left is not None:
        masks = [first_lanes(builder, builder.sub(left, fixed(start))) for start in (0, LANES)]
    a, b = (load(builder, builder.add(where, fixed(64 * n)), FLOATS, mask) for n, mask in enumerate(masks))
    return builder.shuffle_vector(a, b, _EVEN), builder.shuffle_vector(a, b, _ODD)


def _add_up_each(builder: Any, held: list[Any]) -> Any:
    """The sums of sixteen vectors' lanes as one vector: pairs are added up lane by lane, half as many each time."""
    vectors, width = [builder.load(slot) for slot in held], 1
    while len(vectors) > 1:
        lanes = [lane for lane in range(LANES) if lane % (2 * width) < width]
        left = [
            lane
            for start in lanes[::width]
            for lane in (*range(start, start + width), *range(LANES + start, LANES + start + width))
        ]
        masks = [ir.Constant(INTS, [lane + shift for lane in left]) for shift in (0, width)]
        vectors = [
            builder.fadd(builder.shuffle_vector(a, b, masks[0]), builder.shuffle_vector(a, b, masks[1]))
            for a, b in zip(vectors[::2], vectors[1::2], strict=True)
        ]
        width *= 2
    return vectors[0]


def _mix_tile(rows: int) -> Any:
    """tile(kind, V, X, stride, depth, S, line, step, width): sums [rows, width <= 64] of `depth` lines of V times x.

    stride, line, step: bytes from a row of x, of V, of S, to the next.
    """

    def typed(
        typingctx: Any, kind: Any, v: Any, x: Any, stride: Any, depth: Any, to: Any, line: Any, step: Any, width: Any
    ) -> Any:
        half = _is_half(kind)

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, values, shares, stride, depth, to, line, step, width = args
            held = [slots(builder, _WIDE // LANES, floats(0.0)) for _ in range(rows)]
            there = [first_lanes(builder, builder.sub(width, fixed(start))) for start in range(0, _WIDE, LANES)]
            read = there
            if half:
                pairs = builder.lshr(width, fixed(1))
                read = [first_lanes(builder, builder.sub(pairs, fixed(start))) for start in range(0, _WIDE // 2, LANES)]
            with cgutils.for_range(builder, depth, intp=I64) as loop:
                row = builder.add(values, builder.mul(loop.index, line))
                numbers: list[Any] = []
                for n, mask in enumerate(read):
                    ahead = builder.add(builder.mul(line, fixed(_AHEAD)), fixed(64 * n))
                    prefetch(builder, at(builder, row, ahead, I8))
                    found = load(builder, builder.add(row, fixed(64 * n)), INTS if half else FLOATS, mask)
                    numbers += _halves(builder, found) if half else (found,)
                for m in range(rows):
                    offset = builder.add(builder.mul(stride, fixed(m)), builder.mul(loop.index, fixed(4)))
                    share = everywhere(builder, builder.load(at(builder, shares, offset, FLOAT)))
                    for slot, number in zip(held[m], numbers, strict=True):
                        builder.store(fma(builder, share, number, builder.load(slot)), slot)
            for m in range(rows):
                sums = [builder.load(slot) for slot in held[m]]
                if half:
                    sums = [
                        builder.shuffle_vector(sums[n], sums[n + 1], order)
                        for n in range(0, len(sums), 2)
                        for order in (_LOWER, _UPPER)
                    ]
                for n, (value, mask) in enumerate(zip(sums, there, strict=True)):
                    where = builder.add(to, builder.add(builder.mul(step, fixed(m)), fixed(64 * n)))
                    store(builder, where, value, mask)
            return context.get_dummy_value()

        return types.void(kind, *(types.int64,) * 8), generate

    return made_intrinsic(typed)


_dot, _dots = _dot_tile(1), _dot_tile(_TILE)
_mix_1, _mix_2 = _mix_tile(1), _mix_tile(2)


@part
def _attend(
    kind: Any, queries: int, group: int, keys: int, values: int, count: int, width: int, line: int, scale: float,
    scores: int, step: int, out: int,
) -> None:  # fmt: skip
    """Attention of one token's `group` heads that share keys. line, step: bytes of a row of keys, of scores."""
    for l in range(0, count, _TILE):  # noqa: E741
        # The last sixteen may be computed twice: a score does not depend on its neighbours.
        near = min(l, max(0, count - _TILE))
        for g in range(group):
            query, to = queries + g * width * 4, scores + g * step
            if count >= _TILE:
                _dots(kind, keys + near * line, query, line, width, to + near * 4)
            else:
                for i in range(count):
                    _dot(kind, keys + i * line, query, line, width, to + i * 4)
    for g in range(group):
        softmax_line(scores + g * step, count, np.float32(scale))
    row = width * 4
    for i in range(0, width, _WIDE):
        some, g = min(_WIDE, width - i), 0
        w, to = values + i * (line // width), out + i * 4
        while g + 2 <= group:
            _mix_2(kind, w, scores + g * step, step, count, to + g * row, line, row, some)
            g += 2
        if g < group:
            _mix_1(kind, w, scores + g * step, step, count, to + g * row, line, row, some)


@part
def attend_rows(
    kind: Any, qkv: int, pitch: int, first: int, last: int, heads: int, kv_heads: int, width: int, positions: Any,
    slots: Any, keys: int, values: int, length: int, size: int, scale: float, window: int, scores: int, step: int,
    out: int,
) -> None:  # fmt: skip
    """As `attend`, with addresses: what kernels pass each other as arrays takes ten times as long to compile.

    kind: type of the cache's numbers, of `size` bytes. pitch: bytes from a token's row to the next. length: positions
    of a slot. scores: room for a row of `step` bytes of each query head that shares keys.
    """
    group, line = heads // kv_heads, width * size
    for t in range(first, last):
        end = positions[t] + 1
        start = max(0, end - window) if window else 0
        token, row = qkv + t * pitch, out + t * heads * width * 4
        for kv in range(kv_heads):
            place = ((slots[t] * kv_heads + kv) * length + start) * line
            _attend(
                kind, token + kv * group * width * 4, group, keys + place, values + place, end - start, width, line,
                scale, scores, step, row + kv * group * width * 4,
            )  # fmt: skip


@part
def longest(positions: Any, first: int, last: int) -> int:
    """Positions that the tokens `first .. last-1` see at most."""
    most = 0
    for t in range(first, last):
        most = max(most, positions[t] + 1)
    return most


@kernel
def attend(
    qkv: Any, first: int, last: int, heads: int, positions: Any, slots: Any, keys: Any, values: Any,
    scale: float, window: int, out: Any,
) -> None:  # fmt: skip
    """Attention of the tokens `first .. last-1`, each over the positions of its slot up to its own.

    Exact lengths, no mask, and keys shared by several query heads are read once.

    Args:
        qkv: rotated, float32 [T, heads + 2 kv_heads, head_dim].
        first: first row to do.
        last: row after the last one to do.
        heads: query heads.
        positions: int64 [T].
        slots: int64 [T].
        keys: [slots, kv_heads, length, head_dim], which hold the tokens of this step too: float32, or bfloat16 as
            uint16, whose head_dim is even.
        values: as keys.
        scale: of the scores.
        window: positions seen at most, 0 = all.
        out: float32 [T, heads, head_dim].
    """
    scores = np.empty((heads // keys.shape[1], longest(positions, first, last)), np.float32)
    _attend_in(qkv, first, last, heads, positions, slots, keys, values, scale, window, scores, out)


@part
def _attend_in(
    qkv: Any, first: int, last: int, heads: int, positions: Any, slots: Any, keys: Any, values: Any,
    scale: float, window: int, scores: Any, out: Any,
) -> None:  # fmt: skip
    """As `attend`, with room for scores that is the caller's and so outlives its address."""
    attend_rows(
        keys.dtype, address(qkv), qkv.strides[0], first, last, heads, keys.shape[1], keys.shape[3], positions, slots,
        address(keys), address(values), keys.shape[2], keys.itemsize, scale, window, address(scores),
        scores.strides[0], address(out),
    )  # fmt: skip
