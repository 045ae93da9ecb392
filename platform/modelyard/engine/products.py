"""Products with packed matrices on a CPU: y = x W^T + b, for one row of x as well as for hundreds.

A library's product of few rows costs more in its call, and in how it walks through memory, than in arithmetic. Here
BLOCK rows of a matrix lie interleaved, so that one stream of whole cache lines feeds all sums (`tiles`). A matrix is
known to the kernels by a descriptor, int64 [FIELDS]: a step of the whole decoder can then be one call (`step`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numba.core import types
from numba.extending import overload
from numba.np.numpy_support import carray
from torch import Tensor

from modelyard.engine import amx
from modelyard.engine.jit import kernel, part
from modelyard.engine.tiles import (
    BIAS,
    BLOCK,
    COLUMNS,
    DEPTH,
    KIND,
    PANEL,
    ROWS,
    SCALES,
    WEIGHTS,
    float_tile,
    vnni_tile,
)
from modelyard.engine.vectors import dequantize_line, finish_line
from modelyard.lanes import HAS_AMX, HAS_VNNI, address, bytes_at, field, floats_at, integers_at, stack

HALF, BFLOAT16, INT8, INT8_VNNI, BFLOAT16_AMX = range(5)

FORMS: dict[int, np.dtype] = {
    HALF: np.dtype(np.float16),
    BFLOAT16: np.dtype(np.uint16),
    INT8: np.dtype(np.int8),
    INT8_VNNI: np.dtype(np.uint8),
    BFLOAT16_AMX: np.dtype(np.uint32),
}
"""What tiles read a layout as. Kernels are compiled for the type of a layout: each for that one alone."""

_float_1, _float_2, _float_4 = (float_tile(rows) for rows in (1, 2, 4))
_sums_room = stack(4 * BLOCK * 4)


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: its descriptor, and the tensors whose addresses it holds."""

    descriptor: np.ndarray
    weights: Tensor
    scales: Tensor | None
    bias: Tensor | None
    columns: int

    @property
    def form(self) -> np.dtype:
        """What kernels are told of its layout."""
        return FORMS[int(self.descriptor[KIND])]

    def dense(self) -> Tensor:
        """W as float32 [rows, columns], as exact as the packed form."""
        kind, rows = int(self.descriptor[KIND]), int(self.descriptor[ROWS])
        wide = self.weights.float() - (128 if kind == INT8_VNNI else 0)
        lines = wide.permute(0, 2, 4, 1, 3, 5) if kind == BFLOAT16_AMX else wide.transpose(1, 2)
        high = wide.shape[0] * (PANEL if kind == BFLOAT16_AMX else BLOCK)
        plain = lines.reshape(high, -1)[:rows, : self.columns]
        return (plain * self.scales[:rows, None] if self.scales is not None else plain).contiguous()


_MULTIPLE = {HALF: 1, BFLOAT16: 1, INT8: 1, INT8_VNNI: 4, BFLOAT16_AMX: 32}


def kind_of(precision: str) -> int:
    """The layout this CPU computes a precision in."""
    if precision == "float16_packed":
        return HALF
    if precision == "bfloat16":
        return BFLOAT16_AMX if has_amx() else BFLOAT16
    return INT8_VNNI if HAS_VNNI else INT8


def has_amx() -> bool:
    """Whether AMX is there and the operating system lets this process use it."""
    return HAS_AMX and bool(torch.cpu._init_amx())


def pack(weight: Tensor, bias: Tensor | None, precision: str) -> Matrix:
    """A float32 [rows, columns] matrix in the layout of a precision: `float16_packed`, `bfloat16` or `int8`."""
    kind = kind_of(precision)
    rows, columns = weight.shape
    scales = None
    if kind in (INT8, INT8_VNNI):
        scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
        values = (weight / scales[:, None]).round_().to(torch.int16)
        values = (values + 128).to(torch.uint8) if kind == INT8_VNNI else values.to(torch.int8)
        scales = torch.nn.functional.pad(scales, (0, -rows % BLOCK))
    elif kind == HALF:
        values = weight.clamp(-65504, 65504).half()
    else:
        values = weight.bfloat16()
    depth = -(-columns // _MULTIPLE[kind]) * _MULTIPLE[kind]
    blocks = -(-rows // BLOCK)
    if values.shape != (blocks * BLOCK, depth):
        padded = values.new_zeros(blocks * BLOCK, depth)
        padded[:rows, :columns] = values
        values = padded
    if kind == BFLOAT16_AMX:
        packed = values.view(-1, 2, 16, depth // 32, 16, 2).permute(0, 3, 1, 4, 2, 5).contiguous()
    else:
        packed = values.view(blocks, BLOCK, -1, 4 if kind == INT8_VNNI else 1).transpose(1, 2).contiguous()
    descriptor = np.array(
        [kind, rows, columns, depth, packed.data_ptr(), 0 if scales is None else scales.data_ptr(),
         0 if bias is None else bias.data_ptr()], np.int64,
    )  # fmt: skip
    return Matrix(descriptor, packed, scales, bias, columns)


@part
def _widened(
    form: Any, m: int, x: int, stride: int, count: int, y: int, step: int, first: int, last: int, room: int
) -> None:
    """Weights of half the size or less, which become float32 as they are read."""
    kind, depth, rows = field(m, KIND), field(m, DEPTH), field(m, ROWS)
    sums = _sums_room()
    for block in range(first, last):
        w = field(m, WEIGHTS) + block * BLOCK * depth * (1 if kind == INT8 else 2)
        start = block * BLOCK
        scales = field(m, SCALES) + start * 4 if field(m, SCALES) else 0
        bias = field(m, BIAS) + start * 4 if field(m, BIAS) else 0
        t = 0
        while t < count:
            done, row = 4 if count - t >= 4 else 2 if count - t >= 2 else 1, x + t * stride
            if done == 4:
                _float_4(form, w, row, stride, depth, sums)
            elif done == 2:
                _float_2(form, w, row, stride, depth, sums)
            else:
                _float_1(form, w, row, stride, depth, sums)
            for i in range(done):
                to = y + (t + i) * step + start * 4
                finish_line(sums + i * BLOCK * 4, scales, bias, to, min(BLOCK, rows - start))
            t += done


@part
def quantize(x: int, columns: int, values: int, depth: int, scale: int, total: int) -> None:
    """A row of float32 as int8 with a scale, and their sum: a row's result does not depend on its batch mates.

    A row that holds what is not finite gets NaN as its scale. values: int8 [depth], zero behind the columns; scale:
    where it goes, float32; total: where the sum goes, int32.
    """
    row, target = carray(floats_at(x), (columns,)), carray(bytes_at(values), (depth,))
    top, wrong = np.float32(0.0), np.float32(0.0)
    for i in range(columns):
        top = max(top, abs(row[i]))
        wrong += row[i] * np.float32(0.0)
    factor = (top / np.float32(127.0) if top > 0 else np.float32(1.0)) + wrong
    inverse = np.float32(1.0) / factor
    sum_of = np.int32(0)
    for i in range(columns):
        value = np.int8(np.rint(row[i] * inverse)) if wrong == 0 else np.int8(0)
        target[i] = value
        sum_of += np.int32(value)
    for i in range(columns, depth):
        target[i] = np.int8(0)
    carray(floats_at(scale), (1,))[0] = factor
    carray(integers_at(total), (1,))[0] = sum_of


_vnni_1, _vnni_2, _vnni_4 = (vnni_tile(rows) for rows in (1, 2, 4))


@part
def _vnni(
    form: Any, m: int, x: int, stride: int, count: int, y: int, step: int, first: int, last: int, room: int
) -> None:
    """Both sides in 8 bits."""
    depth, rows = field(m, DEPTH), field(m, ROWS)
    scales = room + count * depth
    totals, sums = scales + count * 4, _sums_room()
    for t in range(count):
        place = room + t * depth
        quantize(x + t * stride, field(m, COLUMNS), place, depth, scales + t * 4, totals + t * 4)
    row_scales, row_totals = carray(floats_at(scales), (count,)), carray(integers_at(totals), (count,))
    for block in range(first, last):
        w, start = field(m, WEIGHTS) + block * BLOCK * depth, block * BLOCK
        bias = field(m, BIAS) + start * 4 if field(m, BIAS) else 0
        t = 0
        while t < count:
            done = 4 if count - t >= 4 else 2 if count - t >= 2 else 1
            values = room + t * depth
            if done == 4:
                _vnni_4(w, values, depth, depth // 4, sums)
            elif done == 2:
                _vnni_2(w, values, depth, depth // 4, sums)
            else:
                _vnni_1(w, values, depth, depth // 4, sums)
            for i in range(done):
                # Weights are stored 128 too high, because the instruction takes them without a sign.
                above, to = np.int64(row_totals[t + i]) * 128, y + (t + i) * step + start * 4
                dequantize_line(
                    sums + i * BLOCK * 4, above, field(m, SCALES) + start * 4, row_scales[t + i], bias, to,
                    min(BLOCK, rows - start),
                )  # fmt: skip
            t += done


def room_bytes(count: int, depth: int) -> int:
    """Bytes that `run` needs for `count` rows of x in another form, and to begin a cache line."""
    return count * (2 * depth + 8) + 64


def run(
    form: Any, m: int, x: int, stride: int, count: int, y: int, step: int, first: Any, last: int, room: int
) -> None:
    """As `product`, of addresses, for kernels. stride, step: bytes from a row of x, of y, to the next."""
    raise NotImplementedError("only kernels can call it")


@overload(run, inline="always")
def _run(
    form: Any, m: Any, x: Any, stride: Any, count: Any, y: Any, step: Any, first: Any, last: Any, room: Any
) -> Any:
    chosen = {types.uint32: amx.product_rows, types.uint8: _vnni}.get(form.dtype, _widened)

    def implementation(
        form: Any, m: Any, x: Any, stride: Any, count: Any, y: Any, step: Any, first: Any, last: Any, room: Any
    ) -> None:
        chosen(form, m, x, stride, count, y, step, first, last, room)

    return implementation


@kernel
def product(form: Any, m: Any, x: Any, y: Any, first: int, last: int, room: Any) -> None:
    """y = x W^T + b for blocks `first .. last-1` of the matrix, BLOCK of its rows each.

    Args:
        form: of `FORMS`.
        m: descriptor.
        x: float32 [T, columns], its last axis contiguous.
        y: float32 [T, rows]; columns of other blocks stay as they are.
        first: block.
        last: block after the last one.
        room: uint8 [`room_bytes`].
    """
    place = (address(room) + 63) // 64 * 64
    run(form, address(m), address(x), x.strides[0], x.shape[0], address(y), y.strides[0], first, last, place)


SHARED_WORK = 2**22
"""Weights a thread streams, times an eighth of the rows of x, from which handing it a share of a product pays."""

_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_pools.clear)  # a child has none of their threads


def shares(weights: int, rows: int, threads: int) -> int:
    """Threads that a product of so many weights with `rows` rows of x is worth."""
    return max(1, min(threads, weights * max(rows, 8) // 8 // SHARED_WORK))


def multiply(m: Matrix, x: Tensor) -> Tensor:
    """x W^T + b, float32 [T, rows], by as many of PyTorch's threads as it is worth. x: float32 [T, columns]."""
    y = torch.empty(x.shape[0], int(m.descriptor[ROWS]))
    inputs, outputs = x.contiguous().numpy(), y.numpy()
    size = room_bytes(x.shape[0], int(m.descriptor[DEPTH]))

    def part_of(first: int, last: int) -> None:
        product(m.form, m.descriptor, inputs, outputs, first, last, np.empty(size, np.uint8))

    _share(m, x.shape[0], -(-y.shape[1] // BLOCK), part_of)
    return y


def feed_forward(up: Matrix | Tensor | None, down: Matrix | Tensor | None, x: Tensor) -> Tensor | None:
    """W_down (silu(x G^T) * (x U^T)), float32 [T, rows]; None where these matrices are not computed together.

    up: G and U stacked by rows. x: float32 [T, columns].
    """
    if not (isinstance(up, Matrix) and isinstance(down, Matrix)):
        return None
    if not (up.descriptor[KIND] == down.descriptor[KIND] == BFLOAT16_AMX and amx.fits(up.descriptor)):
        return None
    count, half = x.shape[0], int(up.descriptor[ROWS]) // 2
    values = amx.empty_rows(count, int(up.descriptor[DEPTH]), up.columns)
    amx.round_rows(up.descriptor, x.contiguous().numpy(), values)
    active = amx.empty_rows(count, int(down.descriptor[DEPTH]), half)
    y = torch.empty(count, int(down.descriptor[ROWS]))
    outputs = y.numpy()
    _share(up, count, half // PANEL, lambda a, b: amx.gate(up.descriptor, values, active, a, b))
    _share(
        down, count, -(-y.shape[1] // BLOCK), lambda a, b: amx.multiply_rounded(down.descriptor, active, outputs, a, b)
    )
    return y


def _share(m: Matrix, rows: int, blocks: int, part: Callable[[int, int], None]) -> None:
    """part(first block, block after the last one) over all blocks, by as many of PyTorch's threads as it is worth."""
    threads = torch.get_num_threads()
    parts = 1 if threads == 1 else shares(int(m.descriptor[ROWS]) * m.columns, rows, threads)
    if not rows or parts == 1:
        if rows:
            part(0, blocks)
        return
    pool = _pools.get(threads) or _pools.setdefault(threads, ThreadPoolExecutor(threads, "products"))
    edges = [blocks * i // parts for i in range(parts + 1)]
    others = [pool.submit(part, a, b) for a, b in pairwise(edges[1:])]
    part(0, edges[1])
    for other in others:
        other.result()
