"""Inner loops of matrix products, written as LLVM instructions: what Numba cannot be brought to generate.

A tile is `rows` rows of activations times BLOCK rows of a matrix, summed over the whole width. Its sums stay in vector
registers (or in AMX tile registers), the matrix streams past once, in the order it lies in memory. Each function here
makes a Numba intrinsic; `products` calls them. W, S: addresses of the block's weights and of the sums, X of the first
row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

BLOCK = 64
"""Rows of a matrix that lie interleaved: four AVX-512 vectors of sums, two panels for AMX."""

PANEL = 32
"""Rows of a matrix that AMX tiles take at once: two registers' worth."""

KIND, ROWS, DEPTH, WEIGHTS, SCALES, BIAS, FIELDS = 0, 1, 2, 3, 4, 5, 6
"""Fields of a matrix's descriptor. DEPTH: columns, padded; WEIGHTS, SCALES, BIAS: addresses, 0 = none."""

LANES = 16
_FEATURES = llvm.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f"))
HAS_VNNI = WIDE and bool(_FEATURES.get("avx512vnni"))
HAS_AMX = WIDE and bool(_FEATURES.get("amx-bf16"))

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
_BYTES = ir.VectorType(I8, 4 * LANES)
_BYTE = I8.as_pointer()
_NOWHERE = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)


def made_intrinsic(typed: Callable[..., Any]) -> Any:
    """Numba's decorator, which has no types."""
    return intrinsic(typed)


def at(builder: Any, address: Any, offset: Any, kind: ir.Type) -> Any:
    """A pointer `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def fixed(value: int) -> ir.Constant:
    """A number as a 64-bit integer."""
    return ir.Constant(I64, value)


def everywhere(builder: Any, value: Any) -> Any:
    """A scalar in all lanes."""
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, empty, _NOWHERE)


def _half(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(2 * lane), ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(builder.load(where, align=2), FLOATS)


def _bfloat16(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(2 * lane), ir.VectorType(I16, LANES))
    wide = builder.zext(builder.load(where, align=2), INTS)
    return builder.bitcast(builder.shl(wide, ir.Constant(INTS, [16] * LANES)), FLOATS)


def _integer(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(lane), ir.VectorType(I8, LANES))
    return builder.sitofp(builder.load(where, align=1), FLOATS)


def _float(builder: Any, address: Any, lane: int) -> Any:
    return builder.load(at(builder, address, fixed(4 * lane), FLOATS), align=4)


_READ: dict[str, tuple[int, Callable[..., Any]]] = {
    "half": (2, _half),
    "bfloat16": (2, _bfloat16),
    "int8": (1, _integer),
}


def float_tile(kind: str, rows: int) -> Any:
    """tile(W, X, stride, depth, S): float32 sums [rows, BLOCK] of float32 x and weights, which are widened as read.

    kind: `half`, `bfloat16` or `int8`, laid out [depth, BLOCK]. stride: bytes from a row of x to the next.
    """
    size, read = _READ[kind]
    vectors = BLOCK // LANES if WIDE else 1  # narrower CPUs have too few registers for all sums at once

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums = args
        for first in range(0, BLOCK, vectors * LANES):
            line = fixed(size * BLOCK)
            held = _weighted(builder, read, first, rows, vectors, (w, line), (x, stride), depth)
            _keep(builder, held, sums, fixed(4 * BLOCK), first, FLOATS)
        return context.get_dummy_value()

    return _tile(generate, 5)


def _weighted(
    builder: Any,
    read: Callable[..., Any],
    first: int,
    rows: int,
    vectors: int,
    w: Any,
    x: Any,
    depth: Any,
    ahead: int = 0,
) -> list[list[Any]]:
    """Slots [rows, vectors] that hold the sums over `depth` lines of w, from lane `first`, each times a number of x.

    w: address, bytes to the next line. x: address, bytes to the next row.
    """
    fma = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32")
    zero = ir.Constant(FLOATS, [0.0] * LANES)
    held = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
    for slot in (s for row in held for s in row):
        builder.store(zero, slot)
    with cgutils.for_range(builder, depth, intp=I64) as loop:
        line = builder.add(w[0], builder.mul(loop.index, w[1]))
        if ahead:
            for v in range(vectors):
                _prefetch(builder, line, builder.add(builder.mul(w[1], fixed(ahead)), fixed(4 * LANES * v)))
        weights = [read(builder, line, first + LANES * v) for v in range(vectors)]
        for m in range(rows):
            offset = builder.add(builder.mul(x[1], fixed(m)), builder.mul(loop.index, fixed(4)))
            value = everywhere(builder, builder.load(at(builder, x[0], offset, FLOAT)))
            for v, slot in enumerate(held[m]):
                builder.store(builder.call(fma, [value, weights[v], builder.load(slot)]), slot)
    return held


def mix_tile(rows: int, vectors: int) -> Any:
    """tile(W, X, stride, depth, S, line, step): float32 sums [rows, 16 vectors] of `depth` lines of W times x.

    stride, line, step: bytes from a row of x, of W, of S, to the next.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums, line, step = args
        held = _weighted(builder, _float, 0, rows, vectors, (w, line), (x, stride), depth, 16)
        _keep(builder, held, sums, step, 0, FLOATS)
        return context.get_dummy_value()

    def typed(typingctx: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any, line: Any, step: Any) -> Any:
        return types.void(*(types.int64,) * 7), generate

    return made_intrinsic(typed)


def _prefetch(builder: Any, address: Any, offset: Any) -> None:
    """Asks for a line that will be read soon: sequences are too short for the CPU to see the stream in time."""
    kind = ir.FunctionType(ir.VoidType(), [_BYTE, I32, I32, I32])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(ask, [at(builder, address, offset, I8), *(ir.Constant(I32, n) for n in (0, 3, 1))])


def dot_tile(rows: int) -> Any:
    """tile(K, Q, stride, depth, S): float32 products of Q with `rows` rows of K, 1 or 16.

    depth: sixteens of columns; stride: bytes from a row of K to the next.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        k, q, stride, depth, sums = args
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )
        zero = ir.Constant(FLOATS, [0.0] * LANES)
        held = [cgutils.alloca_once_value(builder, zero) for _ in range(rows)]
        for slot in held:
            builder.store(zero, slot)
        with cgutils.for_range(builder, depth, intp=I64) as loop:
            column = builder.mul(loop.index, fixed(4 * LANES))
            query = _float(builder, builder.add(q, column), 0)
            for m, slot in enumerate(held):
                row = builder.add(builder.add(k, builder.mul(stride, fixed(m))), column)
                if rows > 1:
                    _prefetch(builder, row, builder.mul(stride, fixed(rows)))
                key = _float(builder, row, 0)
                builder.store(builder.call(fma, [query, key, builder.load(slot)]), slot)
        if rows == 1:
            builder.store(add_up(builder, builder.load(held[0])), at(builder, sums, fixed(0), FLOAT))
        else:
            builder.store(_add_up_each(builder, held), at(builder, sums, fixed(0), FLOATS), align=4)
        return context.get_dummy_value()

    return _tile(generate, 5)


def add_up(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, in the order that is quickest."""
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(reduce, [ir.Constant(FLOAT, 0.0), vector], fastmath=("reassoc",))


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


def vnni_tile(rows: int) -> Any:
    """tile(W, X, stride, depth, S): int32 sums [rows, BLOCK] of int8 x times uint8 weights, laid out [depth, BLOCK, 4].

    depth: fours of columns; stride: bytes from a row of x to the next.
    """
    vectors = BLOCK // LANES
    operand = _BYTES if llvm.llvm_version_info >= (22,) else INTS

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums = args
        dot = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(INTS, [INTS, operand, operand]), "llvm.x86.avx512.vpdpbusd.512"
        )
        zero = ir.Constant(INTS, [0] * LANES)
        held = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
        for slot in (s for row in held for s in row):
            builder.store(zero, slot)
        with cgutils.for_range(builder, depth, intp=I64) as loop:
            line = builder.add(w, builder.mul(loop.index, fixed(4 * BLOCK)))
            weights = [builder.load(at(builder, line, fixed(4 * LANES * v), operand), align=1) for v in range(vectors)]
            for m in range(rows):
                offset = builder.add(builder.mul(stride, fixed(m)), builder.mul(loop.index, fixed(4)))
                four = builder.load(at(builder, x, offset, I32), align=1)
                value = builder.bitcast(everywhere(builder, four), operand)
                for v, slot in enumerate(held[m]):
                    builder.store(builder.call(dot, [builder.load(slot), weights[v], value]), slot)
        _keep(builder, held, sums, fixed(4 * BLOCK), 0, INTS)
        return context.get_dummy_value()

    return _tile(generate, 5)


def _keep(builder: Any, held: list[list[Any]], sums: Any, step: Any, first: int, kind: ir.Type) -> None:
    """Writes register sums to rows of memory, `step` bytes from one to the next."""
    for m, row in enumerate(held):
        for v, slot in enumerate(row):
            offset = builder.add(builder.mul(step, fixed(m)), fixed(4 * (first + LANES * v)))
            builder.store(builder.load(slot), at(builder, sums, offset, kind), align=4)


def _tile(generate: Callable[..., Any], count: int) -> Any:
    """An intrinsic of `count` 64-bit integers that returns nothing."""

    def typed(typingctx: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any) -> Any:
        return types.void(*(types.int64,) * count), generate

    return made_intrinsic(typed)


def amx_tile(high: int) -> Any:
    """tile(W, X, stride, depth, S, step): float32 sums [16 high, PANEL] of bfloat16 x and weights.

    Weights are laid out [depth, 2, 16, 16, 2]: sixteen rows of the matrix beside each other by pairs of columns, so
    that whatever a register loads lies in one piece (where it does not, memory is read at half the speed). high:
    registers of x, 1 or 2; with two, each load of weights feeds two products. depth: thirty-twos of columns; stride,
    step: bytes from a row of x, of S, to the next. `amx_begin` says how many rows there are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums, step = args
        zero, dot = _amx(builder, "tilezero", I8), _amx(builder, "tdpbf16ps", I8, I8, I8)
        load, store = (_amx(builder, name, I8, _BYTE, I64) for name in ("tileloadd64", "tilestored64"))
        registers = [ir.Constant(I8, number) for number in range(8)]
        held = [registers[2 * row : 2 * row + 2] for row in range(high)]
        for register in registers[: 2 * high]:
            builder.call(zero, [register])
        with cgutils.for_range(builder, depth, intp=I64) as loop:
            for row in range(high):
                lower = builder.mul(stride, fixed(16 * row))
                where = at(builder, x, builder.add(lower, builder.mul(loop.index, fixed(64))), I8)
                builder.call(load, [registers[4 + row], where, stride])
            line = builder.add(w, builder.mul(loop.index, fixed(64 * PANEL)))
            for column in range(2):
                weights = registers[6 + column]
                builder.call(load, [weights, at(builder, line, fixed(1024 * column), I8), fixed(64)])
                for row in range(high):
                    builder.call(dot, [held[row][column], registers[4 + row], weights])
        for row in range(high):
            lower = builder.mul(step, fixed(16 * row))
            for column in range(2):
                where = at(builder, sums, builder.add(lower, fixed(64 * column)), I8)
                builder.call(store, [held[row][column], where, step])
        return context.get_dummy_value()

    def typed(typingctx: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any, step: Any) -> Any:
        return types.void(*(types.int64,) * 6), generate

    return made_intrinsic(typed)


def _amx(builder: Any, name: str, *kinds: ir.Type) -> Any:
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), list(kinds)), f"llvm.x86.{name}"
    )


@made_intrinsic
def amx_begin(typingctx: Any, layout: Any) -> Any:
    """Sets this thread's tile registers up from the 64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_amx(builder, "ldtilecfg", _BYTE), [builder.inttoptr(args[0], _BYTE)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@made_intrinsic
def amx_end(typingctx: Any) -> Any:
    """Gives the tile registers back: a thread that holds them is slow to switch."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_amx(builder, "tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), generate


@made_intrinsic
def floats_at(typingctx: Any, address: Any) -> Any:
    """The pointer to float32 that an address is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate
