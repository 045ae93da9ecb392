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
"""Rows of a matrix that lie interleaved: four AVX-512 vectors of sums, four AMX tiles."""

LANES = 16
_FEATURES = llvm.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f"))
HAS_VNNI = WIDE and bool(_FEATURES.get("avx512vnni"))
HAS_AMX = WIDE and bool(_FEATURES.get("amx-bf16"))

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_FLOAT = ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)
_BYTES = ir.VectorType(_I8, 4 * LANES)
_BYTE = _I8.as_pointer()
_NOWHERE = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)


def _intrinsic(typed: Callable[..., Any]) -> Any:
    return intrinsic(typed)


def _at(builder: Any, address: Any, offset: Any, kind: ir.Type) -> Any:
    """A pointer `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def _fixed(value: int) -> ir.Constant:
    return ir.Constant(_I64, value)


def _everywhere(builder: Any, value: Any) -> Any:
    """A scalar in all lanes."""
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, empty, _NOWHERE)


def _half(builder: Any, address: Any, lane: int) -> Any:
    at = _at(builder, address, _fixed(2 * lane), ir.VectorType(ir.HalfType(), LANES))
    return builder.fpext(builder.load(at, align=2), _FLOATS)


def _bfloat16(builder: Any, address: Any, lane: int) -> Any:
    at = _at(builder, address, _fixed(2 * lane), ir.VectorType(_I16, LANES))
    wide = builder.zext(builder.load(at, align=2), _INTS)
    return builder.bitcast(builder.shl(wide, ir.Constant(_INTS, [16] * LANES)), _FLOATS)


def _integer(builder: Any, address: Any, lane: int) -> Any:
    at = _at(builder, address, _fixed(lane), ir.VectorType(_I8, LANES))
    return builder.sitofp(builder.load(at, align=1), _FLOATS)


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
        fma = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fma.v{LANES}f32"
        )
        for first in range(0, BLOCK, vectors * LANES):
            zero = ir.Constant(_FLOATS, [0.0] * LANES)
            held = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
            for slot in (s for row in held for s in row):
                builder.store(zero, slot)
            with cgutils.for_range(builder, depth, intp=_I64) as loop:
                line = builder.add(w, builder.mul(loop.index, _fixed(size * BLOCK)))
                weights = [read(builder, line, first + LANES * v) for v in range(vectors)]
                for m in range(rows):
                    offset = builder.add(builder.mul(stride, _fixed(m)), builder.mul(loop.index, _fixed(4)))
                    value = _everywhere(builder, builder.load(_at(builder, x, offset, _FLOAT)))
                    for v, slot in enumerate(held[m]):
                        builder.store(builder.call(fma, [value, weights[v], builder.load(slot)]), slot)
            _keep(builder, held, sums, first, _FLOATS)
        return context.get_dummy_value()

    return _tile(generate, 5)


def vnni_tile(rows: int) -> Any:
    """tile(W, X, stride, depth, S): int32 sums [rows, BLOCK] of int8 x times uint8 weights, laid out [depth, BLOCK, 4].

    depth: fours of columns; stride: bytes from a row of x to the next.
    """
    vectors = BLOCK // LANES
    operand = _BYTES if llvm.llvm_version_info >= (22,) else _INTS

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums = args
        dot = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_INTS, [_INTS, operand, operand]), "llvm.x86.avx512.vpdpbusd.512"
        )
        zero = ir.Constant(_INTS, [0] * LANES)
        held = [[cgutils.alloca_once_value(builder, zero) for _ in range(vectors)] for _ in range(rows)]
        for slot in (s for row in held for s in row):
            builder.store(zero, slot)
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            line = builder.add(w, builder.mul(loop.index, _fixed(4 * BLOCK)))
            weights = [
                builder.load(_at(builder, line, _fixed(4 * LANES * v), operand), align=1) for v in range(vectors)
            ]
            for m in range(rows):
                offset = builder.add(builder.mul(stride, _fixed(m)), builder.mul(loop.index, _fixed(4)))
                four = builder.load(_at(builder, x, offset, _I32), align=1)
                value = builder.bitcast(_everywhere(builder, four), operand)
                for v, slot in enumerate(held[m]):
                    builder.store(builder.call(dot, [builder.load(slot), weights[v], value]), slot)
        _keep(builder, held, sums, 0, _INTS)
        return context.get_dummy_value()

    return _tile(generate, 5)


def _keep(builder: Any, held: list[list[Any]], sums: Any, first: int, kind: ir.Type) -> None:
    """Writes register sums to [rows, BLOCK] in memory."""
    for m, row in enumerate(held):
        for v, slot in enumerate(row):
            at = _at(builder, sums, _fixed(4 * (m * BLOCK + first + LANES * v)), kind)
            builder.store(builder.load(slot), at, align=4)


def _tile(generate: Callable[..., Any], count: int) -> Any:
    """An intrinsic of `count` 64-bit integers that returns nothing."""

    def typed(typingctx: Any, w: Any, x: Any, stride: Any, depth: Any, sums: Any) -> Any:
        return types.void(*(types.int64,) * count), generate

    return _intrinsic(typed)


def amx_tile() -> Any:
    """tile(W, X, stride, depth, S): float32 sums [16, BLOCK] of bfloat16 x and weights, laid out [depth, 4, 16, 16, 2].

    depth: thirty-twos of columns, sixteen rows of the matrix beside each other by pairs of them: whatever a register
    loads lies in one piece (where it does not, memory is read at half the speed). stride: bytes from a row of x to the
    next. `amx_begin` says how many rows there are.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        w, x, stride, depth, sums = args
        zero, dot = _amx(builder, "tilezero", _I8), _amx(builder, "tdpbf16ps", _I8, _I8, _I8)
        load, store = (_amx(builder, name, _I8, _BYTE, _I64) for name in ("tileloadd64", "tilestored64"))
        registers = [ir.Constant(_I8, number) for number in range(8)]
        for column in range(4):
            builder.call(zero, [registers[column]])
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            builder.call(load, [registers[4], _at(builder, x, builder.mul(loop.index, _fixed(64)), _I8), stride])
            line = builder.add(w, builder.mul(loop.index, _fixed(16 * 4 * BLOCK)))
            for column in range(4):
                weights = registers[5 + column % 3]
                builder.call(load, [weights, _at(builder, line, _fixed(1024 * column), _I8), _fixed(64)])
                builder.call(dot, [registers[column], registers[4], weights])
        for column in range(4):
            at = _at(builder, sums, _fixed(64 * column), _I8)
            builder.call(store, [registers[column], at, _fixed(4 * BLOCK)])
        return context.get_dummy_value()

    return _tile(generate, 5)


def _amx(builder: Any, name: str, *kinds: ir.Type) -> Any:
    return cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), list(kinds)), f"llvm.x86.{name}"
    )


@_intrinsic
def amx_begin(typingctx: Any, layout: Any) -> Any:
    """Sets this thread's tile registers up from the 64 bytes at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_amx(builder, "ldtilecfg", _BYTE), [builder.inttoptr(args[0], _BYTE)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_intrinsic
def amx_end(typingctx: Any) -> Any:
    """Gives the tile registers back: a thread that holds them is slow to switch."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.call(_amx(builder, "tilerelease"), [])
        return context.get_dummy_value()

    return types.void(), generate


@_intrinsic
def floats_at(typingctx: Any, address: Any) -> Any:
    """The pointer to float32 that an address is."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], _FLOAT.as_pointer())

    return types.CPointer(types.float32)(types.int64), generate
