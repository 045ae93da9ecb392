"""What lies between the matrix products of a decoder, fused: norms, rotation, cache writes, activations.

A decode step of a small model is bound by dispatch: twenty tensor operations a layer cost more than its
arithmetic. These kernels are four a layer, and attention one. They are compiled by Numba once a machine (cached on
disk), release the GIL, and take float32 arrays whose last axis is contiguous. T is the number of tokens of a step, all
its sequences together. Kernels pass each other addresses: what passes arrays takes several times as long to compile.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.engine.jit import kernel, part
from modelyard.engine.vectors import keep_line, rms_line, rotate_line, silu_line, top_line
from modelyard.lanes import address


@part
def norm_rows(x: int, delta: int, weight: int, out: int, count: int, width: int, epsilon: float) -> None:
    """As `rms_norm`, of addresses; a delta of 0 is none."""
    line = width * 4
    for t in range(count):
        more = delta + t * line if delta else 0
        rms_line(x + t * line, more, weight, out + t * line, width, np.float32(epsilon))


@kernel
def rms_norm(x: Any, delta: Any, weight: Any, epsilon: float, out: Any) -> None:
    """x += delta; out = x / rms(x) * weight, row by row. x, delta, out: [T, H]; an empty delta adds nothing."""
    more = address(delta) if delta.shape[0] else 0
    norm_rows(address(x), more, address(weight), address(out), x.shape[0], x.shape[1], epsilon)


@kernel
def layer_norm(x: Any, delta: Any, weight: Any, bias: Any, epsilon: float, out: Any) -> None:
    """x += delta; out = (x - mean) / deviation * weight + bias, row by row. x, delta, out: [T, H]."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        row = x[t]
        if delta.shape[0]:
            more = delta[t]
            for i in range(width):
                row[i] += more[i]
        total = np.float32(0.0)
        for i in range(width):
            total += row[i]
        mean = total / np.float32(width)
        spread = np.float32(0.0)
        for i in range(width):
            spread += (row[i] - mean) * (row[i] - mean)
        scale = np.float32(1.0) / np.sqrt(spread / np.float32(width) + np.float32(epsilon))
        target = out[t]
        for i in range(width):
            target[i] = (row[i] - mean) * scale * weight[i] + bias[i]


@part
def rotate_rows(
    kind: Any, qkv: int, pitch: int, heads: int, kv_heads: int, width: int, positions: Any, slots: Any, cos: int,
    sin: int, half: int, q_norm: int, k_norm: int, epsilon: float, keys: int, values: int, length: int, size: int,
) -> None:  # fmt: skip
    """As `rotate_and_store`, of addresses: norms, cos and sin of 0 are none.

    kind: type of the cache's numbers, of `size` bytes. pitch: bytes from a token's row to the next. half: columns of
    cos. length: positions of a slot.
    """
    line = width * size
    for t in range(len(positions)):
        position, token = positions[t], qkv + t * pitch
        for h in range(heads + kv_heads):
            row = token + h * width * 4
            if q_norm:
                rms_line(row, 0, q_norm if h < heads else k_norm, row, width, np.float32(epsilon))
            if cos:
                turn = position * half * 4
                rotate_line(row, cos + turn, sin + turn, half)
        for h in range(kv_heads):
            row, place = token + (heads + h) * width * 4, ((slots[t] * kv_heads + h) * length + position) * line
            keep_line(kind, row, keys + place, width)
            keep_line(kind, row + kv_heads * width * 4, values + place, width)


@kernel
def rotate_and_store(
    qkv: Any, heads: int, positions: Any, slots: Any, cos: Any, sin: Any,
    q_norm: Any, k_norm: Any, epsilon: float, keys: Any, values: Any,
) -> None:  # fmt: skip
    """Normalizes and rotates queries and keys in place, and writes keys and values to the cache.

    Args:
        qkv: [T, heads + 2 kv_heads, head_dim].
        heads: query heads.
        positions: int64 [T].
        slots: int64 [T].
        cos: [length, head_dim / 2], empty when the model does not rotate.
        sin: as cos.
        q_norm: [head_dim], empty when the model does not normalize its heads.
        k_norm: as q_norm.
        epsilon: of these norms.
        keys: [slots, kv_heads, length, head_dim], float32, or bfloat16 as uint16.
        values: as keys.
    """
    turns, normed = cos.shape[0] > 0, q_norm.shape[0] > 0
    rotate_rows(
        keys.dtype, address(qkv), qkv.strides[0], heads, keys.shape[1], keys.shape[3], positions, slots,
        address(cos) if turns else 0, address(sin), cos.shape[1], address(q_norm) if normed else 0,
        address(k_norm), epsilon, address(keys), address(values), keys.shape[2], keys.itemsize,
    )  # fmt: skip


@part
def silu_rows(gate_up: int, out: int, count: int, width: int) -> None:
    """As `gated_silu`, of addresses. width: columns of out."""
    for t in range(count):
        row = gate_up + t * 2 * width * 4
        silu_line(row, row + width * 4, out + t * width * 4, width)


@kernel
def gated_silu(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up. gate_up: [T, 2 I], gates first; out: [T, I]."""
    silu_rows(address(gate_up), address(out), out.shape[0], out.shape[1])


@kernel
def largest(scores: Any, values: Any, places: Any) -> None:
    """The largest of every row, NaN where there is one, and its first place: as torch.max, at five times its speed.

    scores: float32 [T, N]; values: float32 [T]; places: int64 [T].
    """
    for t in range(scores.shape[0]):
        row = address(scores) + t * scores.strides[0]
        top_line(row, address(values) + 4 * t, address(places) + 8 * t, scores.shape[1])


def initialize() -> None:
    """Loads the smallest kernel, so that Numba fills its tables: 0.9 s of Python that may run beside C++ work."""
    gated_silu(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32))
