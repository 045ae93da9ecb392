"""Rows of numbers, sixteen at a time, written as LLVM instructions: what Numba does not bring into vectors by itself.

Each is a Numba intrinsic on addresses, for any count; what is not finite stays visible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from modelyard.lanes import (
    FLOAT,
    FLOATS,
    I16,
    I32,
    I64,
    INTS,
    LANES,
    add_up,
    at,
    call,
    each,
    everywhere,
    exp,
    fixed,
    floats,
    fma,
    ints,
    made_intrinsic,
    slots,
)

_SHORTS = ir.VectorType(I16, LANES)
_LANE = ir.Constant(INTS, list(range(LANES)))


def _bfloat16(builder: Any, x: Any) -> Any:
    """The bits of the nearest bfloat16, ties to even; NaN stays one."""
    bits = builder.bitcast(x, INTS)
    odd = builder.and_(builder.lshr(bits, ints(16)), ints(1))
    up = builder.lshr(builder.add(builder.add(bits, ints(0x7FFF)), odd), ints(16))
    is_nan = builder.fcmp_unordered("uno", x, x)
    return builder.trunc(builder.select(is_nan, ints(0x7FC0), up), _SHORTS)


def _silu(builder: Any, gate: Any, up: Any) -> Any:
    below = builder.fadd(floats(1.0), exp(builder, builder.fneg(gate)))
    return builder.fmul(builder.fdiv(gate, below), up)


_ADDRESS = types.int64
_TAKING: dict[int, Callable[[Any], Any]] = {
    3: lambda made: lambda typingctx, a, b, c: made,
    4: lambda made: lambda typingctx, a, b, c, d: made,
    5: lambda made: lambda typingctx, a, b, c, d, e: made,
    6: lambda made: lambda typingctx, a, b, c, d, e, f: made,
    7: lambda made: lambda typingctx, a, b, c, d, e, f, g: made,
}
"""By the number of arguments, which Numba reads off the function itself."""


def _make(generate: Callable[..., None], *kinds: Any) -> Any:
    """An intrinsic of numbers of these types that returns nothing."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        generate(builder, *args)
        return context.get_dummy_value()

    return made_intrinsic(_TAKING[len(kinds)]((types.void(*kinds), build)))


def _silu_line(builder: Any, gates: Any, ups: Any, out: Any, count: Any) -> None:
    with each(builder, count) as row:
        row.store(out, _silu(builder, row.load(gates), row.load(ups)))


def _silu_rounded(builder: Any, gates: Any, ups: Any, out: Any, count: Any) -> None:
    with each(builder, count) as row:
        row.store(out, _bfloat16(builder, _silu(builder, row.load(gates), row.load(ups))))


def _round_line(builder: Any, x: Any, out: Any, count: Any) -> None:
    with each(builder, count) as row:
        row.store(out, _bfloat16(builder, row.load(x)))


def _rotate_line(builder: Any, row: Any, cos: Any, sin: Any, half: Any) -> None:
    upper = builder.add(row, builder.mul(half, fixed(4)))
    with each(builder, half) as part:
        a, b, c, s = (part.load(address) for address in (row, upper, cos, sin))
        part.store(row, builder.fsub(builder.fmul(a, c), builder.fmul(b, s)))
        part.store(upper, builder.fadd(builder.fmul(b, c), builder.fmul(a, s)))


def _top_line(builder: Any, row: Any, value: Any, index: Any, count: Any) -> None:
    highest = cgutils.alloca_once_value(builder, floats(float("-inf")))
    place = cgutils.alloca_once_value(builder, ints(0))
    wrong = cgutils.alloca_once_value(builder, floats(0.0))
    with each(builder, count) as part:
        x, best = part.load(row, float("-inf")), builder.load(highest)
        above = builder.fcmp_ordered(">", x, best)
        here = builder.add(_LANE, everywhere(builder, builder.trunc(part.first, I32)))
        builder.store(builder.select(above, x, best), highest)
        builder.store(builder.select(above, here, builder.load(place)), place)
        is_nan = builder.fcmp_unordered("uno", x, x)
        builder.store(builder.select(is_nan, x, builder.load(wrong)), wrong)
    top = call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, builder.load(highest))
    at_top = builder.fcmp_ordered("==", builder.load(highest), everywhere(builder, top))
    places = builder.select(at_top, builder.load(place), ints(2**31 - 1))
    first = call(builder, f"llvm.vector.reduce.smin.v{LANES}i32", I32, places)
    builder.store(builder.sext(first, I64), at(builder, index, fixed(0), I64))
    builder.store(builder.fadd(top, add_up(builder, builder.load(wrong))), at(builder, value, fixed(0), FLOAT))


def _rms_line(builder: Any, x: Any, delta: Any, weight: Any, out: Any, width: Any, epsilon: Any) -> None:
    (squares,) = slots(builder, 1, floats(0.0))
    changed = builder.icmp_signed("!=", delta, fixed(0))
    with each(builder, width) as row:
        value = builder.fadd(row.load(x), row.only(changed).load(delta))
        row.store(x, value)
        builder.store(fma(builder, value, value, builder.load(squares)), squares)
    mean = builder.fdiv(add_up(builder, builder.load(squares)), builder.sitofp(width, FLOAT))
    root = call(builder, "llvm.sqrt.f32", FLOAT, builder.fadd(mean, epsilon))
    scale = everywhere(builder, builder.fdiv(ir.Constant(FLOAT, 1.0), root))
    with each(builder, width) as row:
        row.store(out, builder.fmul(builder.fmul(row.load(x), scale), row.load(weight)))


def _finish_line(builder: Any, x: Any, scales: Any, bias: Any, out: Any, count: Any) -> None:
    scaled, biased = (builder.icmp_signed("!=", address, fixed(0)) for address in (scales, bias))
    with each(builder, count) as row:
        value = builder.fmul(row.load(x), row.only(scaled).load(scales, 1.0))
        row.store(out, builder.fadd(value, row.only(biased).load(bias)))


def _dequantize_line(
    builder: Any, x: Any, above: Any, scales: Any, factor: Any, bias: Any, out: Any, count: Any
) -> None:
    less, factors = everywhere(builder, builder.trunc(above, I32)), everywhere(builder, factor)
    biased = builder.icmp_signed("!=", bias, fixed(0))
    with each(builder, count) as row:
        whole = builder.sitofp(builder.sub(row.load(x, kind=INTS), less), FLOATS)
        value = builder.fmul(builder.fmul(whole, row.load(scales)), factors)
        row.store(out, builder.fadd(value, row.only(biased).load(bias)))


rotate_line = _make(_rotate_line, *(_ADDRESS,) * 4)
"""rotate_line(row, cos, sin, half): turns the pairs (i, half + i) of a row of float32 by their angles, in place."""

top_line = _make(_top_line, *(_ADDRESS,) * 4)
"""top_line(row, value, index, count): the largest of a row of float32, NaN where there is one, and the first place of
it, int64.
"""

silu_line = _make(_silu_line, *(_ADDRESS,) * 4)
"""silu_line(gates, ups, out, count): out = silu(gates) * ups, all float32."""

silu_rounded = _make(_silu_rounded, *(_ADDRESS,) * 4)
"""silu_rounded(gates, ups, out, count): the same to bfloat16."""

round_line = _make(_round_line, *(_ADDRESS,) * 3)
"""round_line(x, out, count): float32 to bfloat16."""

rms_line = _make(_rms_line, *(_ADDRESS,) * 5, types.float32)
"""rms_line(x, delta, weight, out, width, epsilon): x += delta, where that is not 0; out = x / rms(x) * weight."""

finish_line = _make(_finish_line, *(_ADDRESS,) * 5)
"""finish_line(x, scales, bias, out, count): out = x * scales + bias; an address 0 stands for ones, or zeros."""

dequantize_line = _make(_dequantize_line, *(_ADDRESS,) * 3, types.float32, *(_ADDRESS,) * 3)
"""dequantize_line(x, above, scales, factor, bias, out, count): out = (x - above) * scales * factor + bias of int32 x; a
bias of 0 is none.
"""


@made_intrinsic
def keep_line(typingctx: Any, kind: Any, x: Any, out: Any, count: Any) -> Any:
    """keep_line(kind, x, out, count): float32 as the numbers of a cache: float32, or bfloat16 where kind is uint16."""
    half = kind.dtype == types.uint16

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, source, target, number = args
        with each(builder, number) as row:
            value = row.load(source)
            row.store(target, _bfloat16(builder, value) if half else value)
        return context.get_dummy_value()

    return types.void(kind, *(_ADDRESS,) * 3), generate


@made_intrinsic
def softmax_line(typingctx: Any, row: Any, count: Any, scale: Any) -> Any:
    """softmax_line(row, count, scale): softmax of scale times a row of float32, in place."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, number, factor = args
        total = cgutils.alloca_once_value(builder, floats(0.0))
        highest = cgutils.alloca_once_value(builder, floats(float("-inf")))
        builder.store(floats(0.0), total)
        builder.store(floats(float("-inf")), highest)
        with each(builder, number) as row:
            x = row.load(address, float("-inf"))
            builder.store(call(builder, f"llvm.maxnum.v{LANES}f32", FLOATS, x, builder.load(highest)), highest)
        top = call(builder, f"llvm.vector.reduce.fmax.v{LANES}f32", FLOAT, builder.load(highest))
        top, factors = everywhere(builder, top), everywhere(builder, factor)
        with each(builder, number) as row:
            e = exp(builder, builder.fmul(builder.fsub(row.load(address), top), factors))
            row.store(address, e)
            builder.store(builder.fadd(builder.load(total), builder.select(row.mask, e, floats(0.0))), total)
        share = builder.fdiv(ir.Constant(FLOAT, 1.0), add_up(builder, builder.load(total)))
        shares = everywhere(builder, share)
        with each(builder, number) as row:
            row.store(address, builder.fmul(row.load(address), shares))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), generate
