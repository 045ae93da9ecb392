"""Rows of numbers, sixteen at a time, written as LLVM instructions: what Numba does not bring into vectors by itself.

Each is a Numba intrinsic on addresses, for any count; what is not finite stays visible.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from modelyard.engine.tiles import (
    FLOAT,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    add_up,
    at,
    everywhere,
    fixed,
    made_intrinsic,
)

_MASK, _SHORTS = ir.VectorType(ir.IntType(1), LANES), ir.VectorType(I16, LANES)
_LANE = ir.Constant(INTS, list(range(LANES)))


def _floats(value: float) -> ir.Constant:
    return ir.Constant(FLOATS, [value] * LANES)


def _ints(value: int) -> ir.Constant:
    return ir.Constant(INTS, [value] * LANES)


def _call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)


@dataclass
class _Row:
    """Sixteen numbers of a row: the index of the first, and which of the sixteen there are."""

    builder: Any
    first: Any
    mask: Any

    def load(self, address: Any, otherwise: float = 0.0) -> Any:
        where = at(self.builder, address, self.builder.mul(self.first, fixed(4)), FLOATS)
        name = f"llvm.masked.load.v{LANES}f32.p0"
        return _call(self.builder, name, FLOATS, where, ir.Constant(I32, 4), self.mask, _floats(otherwise))

    def store(self, address: Any, value: Any) -> None:
        size, name = (4, "f32") if value.type == FLOATS else (2, "i16")
        where = at(self.builder, address, self.builder.mul(self.first, fixed(size)), value.type)
        name = f"llvm.masked.store.v{LANES}{name}.p0"
        _call(self.builder, name, ir.VoidType(), value, where, ir.Constant(I32, size), self.mask)


@contextmanager
def _each(builder: Any, count: Any) -> Iterator[_Row]:
    """A loop over `count` numbers."""
    steps = builder.sdiv(builder.add(count, fixed(LANES - 1)), fixed(LANES))
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        first = builder.mul(loop.index, fixed(LANES))
        left = everywhere(builder, builder.trunc(builder.sub(count, first), I32))
        yield _Row(builder, first, builder.icmp_signed("<", _LANE, left))


def _exp(builder: Any, x: Any) -> Any:
    """exp to 2e-7: 2^k times a polynomial."""
    low = builder.select(builder.fcmp_ordered("<", x, _floats(-87.0)), _floats(-87.0), x)
    near = builder.select(builder.fcmp_ordered(">", low, _floats(87.0)), _floats(87.0), low)
    k = _call(builder, f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(near, _floats(1.4426950408889634)))
    # ln 2 in two parts: the first has few enough digits for its product with k to be exact.
    f = _fma(builder, k, _floats(-0.693359375), near)
    f = _fma(builder, k, _floats(2.12194440e-4), f)
    p = _floats(1.0 / 720.0)
    for factor in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        p = _fma(builder, p, f, _floats(factor))
    # A NaN becomes some integer here, and stays a NaN in p.
    power = builder.shl(builder.add(builder.fptosi(builder.select(
        builder.fcmp_ordered("ord", k, k), k, _floats(0.0)), INTS), _ints(127)), _ints(23))  # fmt: skip
    return builder.fmul(p, builder.bitcast(power, FLOATS))


def _bfloat16(builder: Any, x: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even; NaN stays one."""
    bits = builder.bitcast(x, INTS)
    odd = builder.and_(builder.lshr(bits, _ints(16)), _ints(1))
    up = builder.lshr(builder.add(builder.add(bits, _ints(0x7FFF)), odd), _ints(16))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(is_nan, _ints(0x7FC0), up), _SHORTS)


def _silu(builder: Any, gate: Any, up: Any) -> Any:
    below = builder.fadd(_floats(1.0), _exp(builder, builder.fneg(gate)))
    return builder.fmul(builder.fdiv(gate, below), up)


def _make(count: int, generate: Callable[..., None]) -> Any:
    """An intrinsic of `count` 64-bit integers that returns nothing."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        generate(builder, *args)
        return context.get_dummy_value()

    kind = types.void(*(types.int64,) * count)
    if count == 3:
        return made_intrinsic(lambda typingctx, a, b, c: (kind, build))
    return made_intrinsic(lambda typingctx, a, b, c, d: (kind, build))


def _silu_line(builder: Any, gates: Any, ups: Any, out: Any, count: Any) -> None:
    with _each(builder, count) as row:
        row.store(out, _silu(builder, row.load(gates), row.load(ups)))


def _silu_rounded(builder: Any, gates: Any, ups: Any, out: Any, count: Any) -> None:
    with _each(builder, count) as row:
        row.store(out, _bfloat16(builder, _silu(builder, row.load(gates), row.load(ups))))


def _round_line(builder: Any, x: Any, out: Any, count: Any) -> None:
    with _each(builder, count) as row:
        row.store(out, _bfloat16(builder, row.load(x)))


def _rotate_line(builder: Any, row: Any, cos: Any, sin: Any, half: Any) -> None:
    upper = builder.add(row, builder.mul(half, fixed(4)))
    with _each(builder, half) as part:
        a, b, c, s = (part.load(address) for address in (row, upper, cos, sin))
        part.store(row, builder.fsub(builder.fmul(a, c), builder.fmul(b, s)))
        part.store(upper, builder.fadd(builder.fmul(b, c), builder.fmul(a, s)))


def _top_line(builder: Any, row: Any, value: Any, index: Any, count: Any) -> None:
    highest = cgutils.alloca_once_value(builder, _floats(float("-inf")))
    place = cgutils.alloca_once_value(builder, _ints(0))
    wrong = cgutils.alloca_once_value(builder, _floats(0.0))
    with _each(builder, count) as part:
        x, best = part.load(row, float("-inf")), builder.load(highest)
        above = builder.fcmp_ordered(">", x, best)
        here = builder.add(_LANE, everywhere(builder, builder.trunc(part.first, I32)))
        builder.store(builder.select(above, x, best), highest)
        builder.store(builder.select(above, here, builder.load(place)), place)
        is_nan = builder.fcmp_unordered("uno", x, x)
        builder.store(builder.select(is_nan, x, builder.load(wrong)), wrong)
    top = _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, builder.load(highest))
    at_top = builder.fcmp_ordered("==", builder.load(highest), everywhere(builder, top))
    places = builder.select(at_top, builder.load(place), _ints(2**31 - 1))
    first = _call(builder, f"llvm.vector.reduce.smin.v{LANES}i32", I32, places)
    builder.store(builder.sext(first, I64), at(builder, index, fixed(0), I64))
    builder.store(builder.fadd(top, add_up(builder, builder.load(wrong))), at(builder, value, fixed(0), FLOAT))


rotate_line = _make(4, _rotate_line)
"""rotate_line(row, cos, sin, half): turns the pairs (i, half + i) of a row of float32 by their angles, in place."""

top_line = _make(4, _top_line)
"""top_line(row, value, index, count): the largest of a row of float32, NaN where there is one, and the first place of
it, int64.
"""

silu_line = _make(4, _silu_line)
"""silu_line(gates, ups, out, count): out = silu(gates) * ups, all float32."""

silu_rounded = _make(4, _silu_rounded)
"""silu_rounded(gates, ups, out, count): the same to bfloat16."""

round_line = _make(3, _round_line)
"""round_line(x, out, count): float32 to bfloat16."""


@made_intrinsic
def softmax_line(typingctx: Any, row: Any, count: Any, scale: Any) -> Any:
    """softmax_line(row, count, scale): softmax of scale times a row of float32, in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, number, factor = args
        total = cgutils.alloca_once_value(builder, _floats(0.0))
        highest = cgutils.alloca_once_value(builder, _floats(float("-inf")))
        builder.store(_floats(0.0), total)
        builder.store(_floats(float("-inf")), highest)
        with _each(builder, number) as row:
            x = row.load(address, float("-inf"))
            builder.store(_call(builder, f"llvm.maxnum.v{LANES}f32", FLOATS, x, builder.load(highest)), highest)
        top = _call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, builder.load(highest))
        top, factors = everywhere(builder, top), everywhere(builder, factor)
        with _each(builder, number) as row:
            e = _exp(builder, builder.fmul(builder.fsub(row.load(address), top), factors))
            row.store(address, e)
            builder.store(builder.fadd(builder.load(total), builder.select(row.mask, e, _floats(0.0))), total)
        share = builder.fdiv(ir.Constant(FLOAT, 1.0), add_up(builder, builder.load(total)))
        shares = everywhere(builder, share)
        with _each(builder, number) as row:
            row.store(address, builder.fmul(row.load(address), shares))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate
