"""What lies between the matrix products of a decoder, fused: norms, rotation, cache writes, attention, activations.

A decode step of a small model is bound by dispatch: twenty tensor operations a layer cost more than its
arithmetic. These kernels are five a layer. They are compiled by Numba once a machine (cached on disk), release the
GIL, and take float32 arrays whose last axis is contiguous. T is the number of tokens of a step, all its sequences
together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.engine.jit import kernel
from modelyard.engine.tiles import dot_tile, mix_tile
from modelyard.engine.vectors import rotate_line, silu_line, softmax_line, top_line

_dot, _dots = dot_tile(1), dot_tile(16)
_mix_1_16, _mix_1_64, _mix_2_16, _mix_2_64 = (mix_tile(rows, vectors) for rows in (1, 2) for vectors in (1, 4))


@kernel
def rms_norm(x: Any, delta: Any, weight: Any, epsilon: float, out: Any) -> None:
    """x += delta; out = x / rms(x) * weight, row by row. x, delta, out: [T, H]; an empty delta adds nothing."""
    width = x.shape[1]
    for t in range(x.shape[0]):
        row = x[t]
        if delta.shape[0]:
            more = delta[t]
            for i in range(width):
                row[i] += more[i]
        total = np.float32(0.0)
        for i in range(width):
            total += row[i] * row[i]
        scale = np.float32(1.0) / np.sqrt(total / np.float32(width) + np.float32(epsilon))
        target = out[t]
        for i in range(width):
            target[i] = row[i] * scale * weight[i]


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


@kernel
def _head_norm(x: Any, weight: Any, epsilon: float) -> None:
    total = np.float32(0.0)
    for i in range(x.shape[0]):
        total += x[i] * x[i]
    scale = np.float32(1.0) / np.sqrt(total / np.float32(x.shape[0]) + np.float32(epsilon))
    for i in range(x.shape[0]):
        x[i] *= scale * weight[i]


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
        keys: [slots, kv_heads, length, head_dim].
        values: as keys.
    """
    kv_heads = keys.shape[1]
    for t in range(qkv.shape[0]):
        position, slot = positions[t], slots[t]
        for h in range(heads + kv_heads):
            row = qkv[t, h]
            if q_norm.shape[0]:
                _head_norm(row, q_norm if h < heads else k_norm, epsilon)
            if cos.shape[0]:
                rotate_line(row.ctypes.data, cos[position].ctypes.data, sin[position].ctypes.data, cos.shape[1])
        for h in range(kv_heads):
            keys[slot, h, position] = qkv[t, heads + h]
            values[slot, h, position] = qkv[t, heads + kv_heads + h]


@kernel
def attend(
    qkv: Any, first: int, last: int, heads: int, positions: Any, slots: Any, keys: Any, values: Any,
    scale: float, window: int, out: Any,
) -> None:  # fmt: skip
    """Attention of the tokens `first .. last-1`, each over the positions of its slot up to its own.

    Exact lengths, no mask, and keys shared by several query heads are read once.

    Args:
        qkv: rotated, [T, heads + 2 kv_heads, head_dim].
        first: first row to do.
        last: row after the last one to do.
        heads: query heads.
        positions: int64 [T].
        slots: int64 [T].
        keys: [slots, kv_heads, length, head_dim], which hold the tokens of this step too.
        values: as keys.
        scale: of the scores.
        window: positions seen at most, 0 = all.
        out: [T, heads, head_dim].
    """
    group, longest = heads // keys.shape[1], 0
    for t in range(first, last):
        longest = max(longest, positions[t] + 1)
    scores = np.empty((group, longest), np.float32)
    for t in range(first, last):
        end = positions[t] + 1
        start = max(0, end - window) if window else 0
        for kv in range(keys.shape[1]):
            _attend(
                qkv[t, kv * group : (kv + 1) * group], keys[slots[t], kv, start:end], values[slots[t], kv, start:end],
                scale, scores, out[t, kv * group : (kv + 1) * group],
            )  # fmt: skip


@kernel
def _attend(queries: Any, keys: Any, values: Any, scale: float, scores: Any, out: Any) -> None:
    """Attention of one token's heads that share keys. queries, out: [group, width]; keys, values: [count, width]."""
    (count, width), group = keys.shape, queries.shape[0]
    whole, line = width // 16 * 16, keys.strides[0]
    k, q, s = keys.ctypes.data, queries.ctypes.data, scores.ctypes.data
    for l in range(0, count, 16):  # noqa: E741
        # The last sixteen may be computed twice: a score does not depend on its neighbours.
        near = min(l, max(0, count - 16))
        for g in range(group):
            query, to = q + g * queries.strides[0], s + g * scores.strides[0]
            if count >= 16:
                _dots(k + near * line, query, line, whole // 16, to + near * 4)
            else:
                for i in range(count):
                    _dot(k + i * line, query, line, whole // 16, to + i * 4)
    if whole < width:
        for l in range(count):  # noqa: E741
            for g in range(group):
                for i in range(whole, width):
                    scores[g, l] += queries[g, i] * keys[l, i]
    for g in range(group):
        softmax_line(s + g * scores.strides[0], count, np.float32(scale))
    _mix(scores, values, out)


@kernel
def _mix(shares: Any, values: Any, out: Any) -> None:
    """out = shares values. shares: [group, >= count]; values: [count, width]; out: [group, width]."""
    (count, width), group = values.shape, out.shape[0]
    stride, line, step = shares.strides[0], values.strides[0], out.strides[0]
    g = 0
    while g < group:
        pair = group - g >= 2
        x, i = shares.ctypes.data + g * stride, 0
        while i + 16 <= width:
            w, to, broad = values.ctypes.data + 4 * i, out.ctypes.data + g * step + 4 * i, i + 64 <= width
            if pair and broad:
                _mix_2_64(w, x, stride, count, to, line, step)
            elif pair:
                _mix_2_16(w, x, stride, count, to, line, step)
            elif broad:
                _mix_1_64(w, x, stride, count, to, line, step)
            else:
                _mix_1_16(w, x, stride, count, to, line, step)
            i += 64 if broad else 16
        for j in range(i, width):
            for k in range(g, g + 2 if pair else g + 1):
                total = np.float32(0.0)
                for l in range(count):  # noqa: E741
                    total += shares[k, l] * values[l, j]
                out[k, j] = total
        g += 2 if pair else 1


@kernel
def gated_silu(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up. gate_up: [T, 2 I], gates first; out: [T, I]."""
    width = out.shape[1]
    for t in range(out.shape[0]):
        row = gate_up[t]
        silu_line(row.ctypes.data, row[width:].ctypes.data, out[t].ctypes.data, width)


@kernel
def largest(scores: Any, values: Any, places: Any) -> None:
    """The largest of every row, NaN where there is one, and its first place: as torch.max, at five times its speed.

    scores: float32 [T, N]; values: float32 [T]; places: int64 [T].
    """
    for t in range(scores.shape[0]):
        top_line(scores[t].ctypes.data, values[t:].ctypes.data, places[t:].ctypes.data, scores.shape[1])


def initialize() -> None:
    """Loads the smallest kernel, so that Numba fills its tables: 0.9 s of Python that may run beside C++ work."""
    gated_silu(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32))
