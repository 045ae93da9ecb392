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


@kernel
def _exp(values: Any, bits: Any, count: int) -> None:
    """exp of values[:count], in place, to 2e-7: 2^k times a polynomial; libm's scalar exp would not vectorize.

    `bits` is int32 scratch.
    """
    factors = bits.view(np.float32)
    for i in range(count):
        z = max(values[i], np.float32(-87.0)) * np.float32(1.4426950408889634)
        z = min(z, np.float32(126.0))
        k = np.floor(z + np.float32(0.5))
        f = (z - k) * np.float32(0.6931471805599453)
        bits[i] = np.int32((np.int32(k) + np.int32(127)) << np.int32(23))
        p = np.float32(1.0 / 720.0)
        p = p * f + np.float32(1.0 / 120.0)
        p = p * f + np.float32(1.0 / 24.0)
        p = p * f + np.float32(1.0 / 6.0)
        p = p * f + np.float32(0.5)
        p = p * f + np.float32(1.0)
        values[i] = p * f + np.float32(1.0)
    for i in range(count):
        values[i] *= factors[i]


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
def _rotate(x: Any, cos: Any, sin: Any) -> None:
    half = cos.shape[0]
    for i in range(half):
        a, b = x[i], x[i + half]
        x[i] = a * cos[i] - b * sin[i]
        x[i + half] = b * cos[i] + a * sin[i]


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
                _rotate(row, cos[position], sin[position])
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
    kv_heads, width = keys.shape[1], keys.shape[3]
    group = heads // kv_heads
    longest = 0
    for t in range(first, last):
        longest = max(longest, positions[t] + 1)
    scores = np.empty((group, longest), np.float32)
    bits = np.empty(longest, np.int32)
    for t in range(first, last):
        slot, end = slots[t], positions[t] + 1
        start = max(0, end - window) if window else 0
        count = end - start
        for kv in range(kv_heads):
            near = keys[slot, kv, start:end]
            for l in range(count):  # noqa: E741
                key = near[l]
                for g in range(group):
                    query = qkv[t, kv * group + g]
                    total = np.float32(0.0)
                    for i in range(width):
                        total += query[i] * key[i]
                    scores[g, l] = total * np.float32(scale)
            for g in range(group):
                row = scores[g]
                top = row[0]
                for l in range(1, count):  # noqa: E741
                    top = max(top, row[l])
                for l in range(count):  # noqa: E741
                    row[l] -= top
                _exp(row, bits, count)
                total = np.float32(0.0)
                for l in range(count):  # noqa: E741
                    total += row[l]
                norm = np.float32(1.0) / total
                for l in range(count):  # noqa: E741
                    row[l] *= norm
            seen = values[slot, kv, start:end]
            for g in range(group):
                out[t, kv * group + g, :] = np.float32(0.0)
            for l in range(count):  # noqa: E741
                value = seen[l]
                for g in range(group):
                    target = out[t, kv * group + g]
                    p = scores[g, l]
                    for i in range(width):
                        target[i] += p * value[i]


@kernel
def gated_silu(gate_up: Any, out: Any) -> None:
    """out = silu(gate) * up. gate_up: [T, 2 I], gates first; out: [T, I]."""
    width = out.shape[1]
    scratch, bits = np.empty(width, np.float32), np.empty(width, np.int32)
    for t in range(out.shape[0]):
        row, target = gate_up[t], out[t]
        for i in range(width):
            scratch[i] = -row[i]
        _exp(scratch, bits, width)
        for i in range(width):
            target[i] = row[i] / (np.float32(1.0) + scratch[i]) * row[width + i]


def initialize() -> None:
    """Loads the smallest kernel, so that Numba fills its tables: 0.9 s of Python that may run beside C++ work."""
    gated_silu(np.zeros((1, 2), np.float32), np.zeros((1, 1), np.float32))
