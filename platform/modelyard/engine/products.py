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
from numba.np.numpy_support import carray
from torch import Tensor

from modelyard.engine import amx
from modelyard.engine.jit import kernel
from modelyard.engine.tiles import (
    BIAS,
    BLOCK,
    DEPTH,
    HAS_AMX,
    HAS_VNNI,
    KIND,
    PANEL,
    ROWS,
    SCALES,
    WEIGHTS,
    float_tile,
    floats_at,
    vnni_tile,
)

HALF, BFLOAT16, INT8, INT8_VNNI, BFLOAT16_AMX = range(5)

_half_1, _half_2, _half_4 = (float_tile("half", rows) for rows in (1, 2, 4))
_bfloat16_1, _bfloat16_2, _bfloat16_4 = (float_tile("bfloat16", rows) for rows in (1, 2, 4))
_int8_1, _int8_2, _int8_4 = (float_tile("int8", rows) for rows in (1, 2, 4))


@dataclass(frozen=True)
class Matrix:
    """A packed matrix: its descriptor, and the tensors whose addresses it holds."""

    descriptor: np.ndarray
    weights: Tensor
    scales: Tensor | None
    bias: Tensor | None
    columns: int

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
        [kind, rows, depth, packed.data_ptr(), 0 if scales is None else scales.data_ptr(),
         0 if bias is None else bias.data_ptr()], np.int64,
    )  # fmt: skip
    return Matrix(descriptor, packed, scales, bias, columns)


@kernel
def _write(y: Any, first: int, count: int, block: int, sums: Any, m: Any) -> None:
    """Sums of one block to `count` rows of y, with the bias where there is one."""
    rows = m[ROWS]
    start = block * BLOCK
    width = min(BLOCK, rows - start)
    if m[BIAS] != 0:
        bias = carray(floats_at(m[BIAS]), (rows,))
        for i in range(count):
            for n in range(width):
                y[first + i, start + n] = sums[i, n] + bias[start + n]
    else:
        for i in range(count):
            for n in range(width):
                y[first + i, start + n] = sums[i, n]


@kernel
def _sum(kind: int, rows: int, w: Any, x: Any, stride: int, depth: int, to: Any) -> None:
    """The tile of a layout for 1, 2 or 4 rows of x."""
    if kind == HALF:
        if rows == 4:
            _half_4(w, x, stride, depth, to)
        elif rows == 2:
            _half_2(w, x, stride, depth, to)
        else:
            _half_1(w, x, stride, depth, to)
    elif kind == BFLOAT16:
        if rows == 4:
            _bfloat16_4(w, x, stride, depth, to)
        elif rows == 2:
            _bfloat16_2(w, x, stride, depth, to)
        else:
            _bfloat16_1(w, x, stride, depth, to)
    elif rows == 4:
        _int8_4(w, x, stride, depth, to)
    elif rows == 2:
        _int8_2(w, x, stride, depth, to)
    else:
        _int8_1(w, x, stride, depth, to)


@kernel
def _widened(m: Any, x: Any, y: Any, first: int, last: int) -> None:
    """Weights of half the size or less, which become float32 as they are read."""
    kind, depth, stride = m[KIND], m[DEPTH], x.strides[0]
    sums = np.empty((4, BLOCK), np.float32)
    to, start = sums.ctypes.data, x.ctypes.data
    scaled = (m[ROWS] + BLOCK - 1) // BLOCK if m[SCALES] != 0 else 0
    scales = carray(floats_at(m[SCALES]), (scaled, BLOCK))
    for block in range(first, last):
        w = m[WEIGHTS] + block * BLOCK * depth * (1 if kind == INT8 else 2)
        t = 0
        while t < x.shape[0]:
            left = x.shape[0] - t
            done = 4 if left >= 4 else 2 if left >= 2 else 1
            _sum(kind, done, w, start + t * stride, stride, depth, to)
            if scaled:
                for i in range(done):
                    for n in range(BLOCK):
                        sums[i, n] *= scales[block, n]
            _write(y, t, done, block, sums, m)
            t += done


@kernel
def quantize(x: Any, values: Any, scales: Any, totals: Any) -> None:
    """Rows of x as int8 with a scale each, and their sums: a row's result does not depend on its batch mates.

    A row that holds what is not finite gets NaN as its scale.
    x: float32 [T, K]; values: int8 [T, >= K], zero behind K; scales: float32 [T]; totals: int32 [T].
    """
    for t in range(x.shape[0]):
        row, target = x[t], values[t]
        top, wrong = np.float32(0.0), np.float32(0.0)
        for i in range(row.shape[0]):
            top = max(top, abs(row[i]))
            wrong += row[i] * np.float32(0.0)
        scale = (top / np.float32(127.0) if top > 0 else np.float32(1.0)) + wrong
        inverse = np.float32(1.0) / scale
        total = np.int32(0)
        for i in range(row.shape[0]):
            value = np.int8(np.rint(row[i] * inverse)) if wrong == 0 else np.int8(0)
            target[i] = value
            total += np.int32(value)
        scales[t], totals[t] = scale, total


if HAS_VNNI:
    _vnni_1, _vnni_2, _vnni_4 = (vnni_tile(rows) for rows in (1, 2, 4))

    @kernel
    def _vnni(m: Any, x: Any, y: Any, first: int, last: int) -> None:
        count = x.shape[0]
        values = np.zeros((count, m[DEPTH]), np.int8)
        row_scales, totals = np.empty(count, np.float32), np.empty(count, np.int32)
        quantize(x, values, row_scales, totals)
        _vnni_blocks(m, values, row_scales, totals, y, first, last)

    @kernel
    def _vnni_blocks(m: Any, values: Any, row_scales: Any, totals: Any, y: Any, first: int, last: int) -> None:
        """Of quantized rows, which are the caller's: Numba frees an array whose address alone is used any more."""
        depth, count = m[DEPTH], values.shape[0]
        whole, sums = np.empty((4, BLOCK), np.int32), np.empty((4, BLOCK), np.float32)
        to, start = whole.ctypes.data, values.ctypes.data
        blocks = (m[ROWS] + BLOCK - 1) // BLOCK
        scales = carray(floats_at(m[SCALES]), (blocks, BLOCK))
        for block in range(first, last):
            w = m[WEIGHTS] + block * BLOCK * depth
            t = 0
            while t < count:
                left = count - t
                if left >= 4:
                    _vnni_4(w, start + t * depth, depth, depth // 4, to)
                    done = 4
                elif left >= 2:
                    _vnni_2(w, start + t * depth, depth, depth // 4, to)
                    done = 2
                else:
                    _vnni_1(w, start + t * depth, depth, depth // 4, to)
                    done = 1
                for i in range(done):
                    # Weights are stored 128 too high, because the instruction takes them without a sign.
                    above, scale = totals[t + i] * np.int32(128), row_scales[t + i]
                    # Two loops: in one, the compiler might multiply in another order here than inside a whole step.
                    for n in range(BLOCK):
                        sums[i, n] = np.float32(whole[i, n] - above) * scales[block, n]
                    for n in range(BLOCK):
                        sums[i, n] *= scale
                _write(y, t, done, block, sums, m)
                t += done

else:
    _vnni = _widened

_amx = amx.multiply if HAS_AMX else _widened


@kernel
def product(m: Any, x: Any, y: Any, first: int, last: int) -> None:
    """y = x W^T + b for blocks `first .. last-1` of the matrix, BLOCK of its rows each.

    Args:
        m: descriptor.
        x: float32 [T, columns], its last axis contiguous.
        y: float32 [T, rows]; columns of other blocks stay as they are.
        first: block.
        last: block after the last one.
    """
    if m[KIND] == INT8_VNNI:
        _vnni(m, x, y, first, last)
    elif m[KIND] == BFLOAT16_AMX:
        _amx(m, x, y, first, last)
    else:
        _widened(m, x, y, first, last)


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
    _share(m, x.shape[0], -(-y.shape[1] // BLOCK), lambda a, b: product(m.descriptor, inputs, outputs, a, b))
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
    values = amx.rounded(x.contiguous().numpy(), up.descriptor[DEPTH])
    active = amx.empty_rows(count, down.descriptor[DEPTH], half)
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
