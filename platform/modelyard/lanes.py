"""What LLVM instructions for sixteen numbers at a time are written with, and what this CPU has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array

LANES = 16
_FEATURES = llvm.get_host_cpu_features()
WIDE = bool(_FEATURES.get("avx512f"))
HAS_VNNI = WIDE and bool(_FEATURES.get("avx512vnni"))
HAS_AMX = WIDE and bool(_FEATURES.get("amx-bf16"))

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS, INTS = ir.VectorType(FLOAT, LANES), ir.VectorType(I32, LANES)
MASK = ir.VectorType(ir.IntType(1), LANES)
BYTE = I8.as_pointer()
_NOWHERE = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
_LANE = ir.Constant(INTS, list(range(LANES)))


def made_intrinsic(typed: Callable[..., Any]) -> Any:
    """Numba's decorator, which has no types."""
    return intrinsic(typed)


def at(builder: Any, address: Any, offset: Any, kind: ir.Type) -> Any:
    """A pointer `offset` bytes behind an address."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def fixed(value: int) -> ir.Constant:
    """A number as a 64-bit integer."""
    return ir.Constant(I64, value)


def floats(value: float) -> ir.Constant:
    """A number in all lanes."""
    return ir.Constant(FLOATS, [value] * LANES)


def ints(value: int) -> ir.Constant:
    """An integer in all lanes."""
    return ir.Constant(INTS, [value] * LANES)


def everywhere(builder: Any, value: Any) -> Any:
    """A scalar in all lanes."""
    empty = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, empty, _NOWHERE)


def call(builder: Any, name: str, result: ir.Type, *arguments: Any) -> Any:
    """A call of one of LLVM's own functions."""
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once."""
    return call(builder, f"llvm.fma.v{LANES}f32", FLOATS, a, b, c)


def slots(builder: Any, count: int, value: ir.Constant) -> list[Any]:
    """Variables that hold a vector each, which LLVM keeps in registers."""
    held = [cgutils.alloca_once_value(builder, value) for _ in range(count)]
    for slot in held:
        builder.store(value, slot)
    return held


def first_lanes(builder: Any, count: Any) -> Any:
    """A mask of the first `count` lanes: a 64-bit integer of any sign and size."""
    low = builder.select(builder.icmp_signed("<", count, fixed(LANES)), count, fixed(LANES))
    return builder.icmp_signed("<", _LANE, everywhere(builder, builder.trunc(low, I32)))


def load(builder: Any, address: Any, kind: ir.Type, mask: Any = None, otherwise: float = 0.0) -> Any:
    """Sixteen numbers of 32 bits from an address, `otherwise` where the mask is not set."""
    where = builder.inttoptr(address, kind.as_pointer())
    if mask is None:
        return builder.load(where, align=4)
    name, rest = ("f32", floats(otherwise)) if kind == FLOATS else ("i32", ints(0))
    return call(builder, f"llvm.masked.load.v{LANES}{name}.p0", kind, where, ir.Constant(I32, 4), mask, rest)


def store(builder: Any, address: Any, value: Any, mask: Any) -> None:
    """Numbers of 32 or 16 bits to an address, where the mask is set."""
    size, name = (4, "f32") if value.type == FLOATS else (2, "i16")
    where = builder.inttoptr(address, value.type.as_pointer())
    name = f"llvm.masked.store.v{LANES}{name}.p0"
    call(builder, name, ir.VoidType(), value, where, ir.Constant(I32, size), mask)


@dataclass
class Row:
    """Sixteen numbers of a row: the index of the first, and which of the sixteen there are."""

    builder: Any
    first: Any
    mask: Any

    def load(self, address: Any, otherwise: float = 0.0, kind: ir.Type = FLOATS) -> Any:
        where = self.builder.add(address, self.builder.mul(self.first, fixed(4)))
        return load(self.builder, where, kind, self.mask, otherwise)

    def only(self, wanted: Any) -> Row:
        """The same, none of them where `wanted` is not so."""
        nothing = ir.Constant(MASK, [0] * LANES)
        return Row(self.builder, self.first, self.builder.select(wanted, self.mask, nothing))

    def store(self, address: Any, value: Any) -> None:
        size = 4 if value.type == FLOATS else 2
        store(self.builder, self.builder.add(address, self.builder.mul(self.first, fixed(size))), value, self.mask)


@contextmanager
def each(builder: Any, count: Any) -> Iterator[Row]:
    """A loop over `count` numbers."""
    steps = builder.sdiv(builder.add(count, fixed(LANES - 1)), fixed(LANES))
    with cgutils.for_range(builder, steps, intp=I64) as loop:
        first = builder.mul(loop.index, fixed(LANES))
        yield Row(builder, first, first_lanes(builder, builder.sub(count, first)))


def exp(builder: Any, x: Any) -> Any:
    """exp to 2e-7: 2^k times a polynomial."""
    low = builder.select(builder.fcmp_ordered("<", x, floats(-87.0)), floats(-87.0), x)
    near = builder.select(builder.fcmp_ordered(">", low, floats(87.0)), floats(87.0), low)
    k = call(builder, f"llvm.rint.v{LANES}f32", FLOATS, builder.fmul(near, floats(1.4426950408889634)))
    # ln 2 in two parts: the first has few enough digits for its product with k to be exact.
    f = fma(builder, k, floats(-0.693359375), near)
    f = fma(builder, k, floats(2.12194440e-4), f)
    p = floats(1.0 / 720.0)
    for factor in (1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0):
        p = fma(builder, p, f, floats(factor))
    # A NaN becomes some integer here, and stays a NaN in p.
    power = builder.shl(builder.add(builder.fptosi(builder.select(
        builder.fcmp_ordered("ord", k, k), k, floats(0.0)), INTS), ints(127)), ints(23))  # fmt: skip
    return builder.fmul(p, builder.bitcast(power, FLOATS))


def add_up(builder: Any, vector: Any) -> Any:
    """The sum of a vector's lanes, in the order that is quickest."""
    kind = ir.FunctionType(FLOAT, [FLOAT, FLOATS])
    reduce = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return builder.call(reduce, [ir.Constant(FLOAT, 0.0), vector], fastmath=("reassoc",))


def prefetch(builder: Any, where: Any, nearness: int = 3) -> None:
    """Asks for a line that will be read soon. nearness: 3 = to the nearest cache, 2 = to the next one."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), where, *(ir.Constant(I32, n) for n in (0, nearness, 1)))


@made_intrinsic
def address(typingctx: Any, array: Any) -> Any:
    """Where the numbers of an array begin. Numba frees an array whose address alone is used any more."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(make_array(array)(context, builder, args[0]).data, I64)

    return types.int64(array), generate


@made_intrinsic
def floats_at(typingctx: Any, address: Any) -> Any:
    """The pointer to float32 that an address is."""
    return types.CPointer(types.float32)(types.int64), _pointer(FLOAT)


@made_intrinsic
def bytes_at(typingctx: Any, address: Any) -> Any:
    """The pointer to int8 that an address is."""
    return types.CPointer(types.int8)(types.int64), _pointer(I8)


@made_intrinsic
def integers_at(typingctx: Any, address: Any) -> Any:
    """The pointer to int32 that an address is."""
    return types.CPointer(types.int32)(types.int64), _pointer(I32)


def _pointer(kind: ir.Type) -> Callable[..., Any]:
    return lambda context, builder, signature, args: builder.inttoptr(args[0], kind.as_pointer())


@made_intrinsic
def field(typingctx: Any, address: Any, number: Any) -> Any:
    """field(address, n): the n-th int64 from an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(at(builder, args[0], builder.mul(args[1], fixed(8)), I64))

    return types.int64(types.int64, types.int64), generate


@made_intrinsic
def clear(typingctx: Any, address: Any, size: Any) -> Any:
    """clear(address, n): n bytes become 0."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cgutils.memset(builder, builder.inttoptr(args[0], BYTE), args[1], 0)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def stack(size: int) -> Any:
    """room(): the address of `size` bytes of the calling function, which begin a cache line."""

    @made_intrinsic
    def room(typingctx: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            with builder.goto_entry_block():
                held = builder.alloca(ir.ArrayType(I8, size))
            held.align = 64
            return builder.ptrtoint(held, I64)

        return types.int64(), generate

    return room
