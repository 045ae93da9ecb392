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

from modelyard.lanes import (
    BYTE,
    FLOAT,
    FLOATS,
    I8,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    WIDE,
    at,
    everywhere,
    fixed,
    floats,
    fma,
    ints,
    made_intrinsic,
    prefetch,
    slots,
)

BLOCK = 64
"""Rows of a matrix that lie interleaved: four AVX-512 vectors of sums, two panels for AMX."""

PANEL = 32
"""Rows of a matrix that AMX tiles take at once: two registers' worth."""

KIND, ROWS, COLUMNS, DEPTH, WEIGHTS, SCALES, BIAS, FIELDS = range(8)
"""Fields of a matrix's descriptor. DEPTH: COLUMNS, padded; WEIGHTS, SCALES, BIAS: addresses, 0 = none."""

_BYTES = ir.VectorType(I8, 4 * LANES)


def _half(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(2 * lane), ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(builder.load(where, align=2), FLOATS)


def _bfloat16(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(2 * lane), ir.VectorType(I16, LANES))
    wide = builder.zext(builder.load(where, align=2), INTS)
    return builder.bitcast(builder.shl(wide, ints(16)), FLOATS)


def _integer(builder: Any, address: Any, lane: int) -> Any:
    where = at(builder, address, fixed(lane), ir.VectorType(I8, LANES))
    return builder.sitofp(builder.load(where, align=1), FLOATS)


_READ: dict[Any, tuple[int, Callable[..., Any]]] = {
    types.float16: (2, _half),
    types.uint16: (2, _bfloat16),
    types.int8: (1, _integer),
}


def float_tile(rows: int) -> Any:
    """tile(form, W, X, stride, depth, S): float32 sums [rows, BLOCK] of float32 x and weights that are widened as read.

    form: of weights laid out [depth, BLOCK]: float16, uint16 for bfloat16, or int8. stride: bytes from a row of x to
    the next.
    """
    vectors = BLOCK // LANES if WIDE else 1  # narrower CPUs have too few registers for all sums at once

    def typed(typingctx: Any, form: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any) -> Any:
        size, read = _READ[form.dtype]

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, w, x, stride, depth, sums = args
            for first in range(0, BLOCK, vectors * LANES):
                held = [slots(builder, vectors, floats(0.0)) for _ in range(rows)]
                with cgutils.for_range(builder, depth, intp=I64) as loop:
                    line = builder.add(w, builder.mul(loop.index, fixed(size * BLOCK)))
                    weights = [read(builder, line, first + LANES * v) for v in range(vectors)]
                    for m in range(rows):
                        offset = builder.add(builder.mul(stride, fixed(m)), builder.mul(loop.index, fixed(4)))
                        value = everywhere(builder, builder.load(at(builder, x, offset, FLOAT)))
                        for v, slot in enumerate(held[m]):
                            builder.store(fma(builder, value, weights[v], builder.load(slot)), slot)
                _keep(builder, held, sums, first, FLOATS)
            return context.get_dummy_value()

        return types.void(form, *(types.int64,) * 5), generate

    return made_intrinsic(typed)


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
        held = [slots(builder, vectors, ints(0)) for _ in range(rows)]
        with cgutils.for_range(builder, depth, intp=I64) as loop:
            line = builder.add(w, builder.mul(loop.index, fixed(4 * BLOCK)))
            weights = [builder.load(at(builder, line, fixed(4 * LANES * v), operand), align=1) for v in range(vectors)]
            for m in range(rows):
                offset = builder.add(builder.mul(stride, fixed(m)), builder.mul(loop.index, fixed(4)))
                four = builder.load(at(builder, x, offset, I32), align=1)
                value = builder.bitcast(everywhere(builder, four), operand)
                for v, slot in enumerate(held[m]):
                    builder.store(builder.call(dot, [builder.load(slot), weights[v], value]), slot)
        _keep(builder, held, sums, 0, INTS)
        return context.get_dummy_value()

    def typed(typingctx: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any) -> Any:
        return types.void(*(types.int64,) * 5), generate

    return made_intrinsic(typed)


def _keep(builder: Any, held: list[list[Any]], sums: Any, first: int, kind: ir.Type) -> None:
    """Writes register sums to rows of BLOCK numbers."""
    for m, row in enumerate(held):
        for v, slot in enumerate(row):
            offset = fixed(4 * (m * BLOCK + first + LANES * v))
            builder.store(builder.load(slot), at(builder, sums, offset, kind), align=4)


_AHEAD = 8192
"""Bytes of weights that AMX tiles ask for early. The CPU's own look-ahead does not keep up with them: with it alone a
matrix that no cache holds streams at two thirds of the speed."""


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
        load, store = (_amx(builder, name, I8, BYTE, I64) for name in ("tileloadd64", "tilestored64"))
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
            soon = at(builder, line, fixed(_AHEAD), I8)
            for offset in range(0, 64 * PANEL, 64):
                prefetch(builder, builder.gep(soon, [fixed(offset)]), 2)
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
        builder.call(_amx(builder, "ldtilecfg", BYTE), [builder.inttoptr(args[0], BYTE)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@made_intrinsic
def amx_end(typingctx: Any) -> Any:
    """Gives the tile registers back: a thread that holds them is slow to switch."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_amx(builder, "tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), generate
