"""A whole step of a decoder as one call: for a few tokens of a small model, calls cost more than what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba.np.numpy_support import carray

from modelyard.engine import amx
from modelyard.engine.jit import kernel
from modelyard.engine.kernels import attend, gated_silu, rms_norm, rotate_and_store
from modelyard.engine.products import BFLOAT16_AMX, Matrix, product
from modelyard.engine.tiles import BLOCK, FIELDS, HAS_AMX, KIND, ROWS, floats_at
from modelyard.engine.weights import Mlp, Weights

_QKV, _OUT, _UP, _DOWN = range(4)


@dataclass(frozen=True)
class Table:
    """Where the kernels find a model: descriptors [layers, 4, FIELDS] of its matrices, and addresses [layers, 4] of its
    norms (before attention, before the feed-forward network, of queries, of keys; 0 = none). `largest`: weights of the
    largest matrix. The addresses are those of `weights`, which has to outlive them.
    """

    matrices: np.ndarray
    norms: np.ndarray
    largest: int

    @classmethod
    def of(cls, weights: Weights) -> Self | None:
        """None for a model that has something else between its products, or products of a library."""
        c = weights.config
        matrices = np.zeros((c.layers, 4, FIELDS), np.int64)
        norms = np.zeros((c.layers, 4), np.int64)
        largest = 0
        for index, layer in enumerate(weights.layers):
            if c.family == "gpt2" or not isinstance(layer.mlp, Mlp):
                return None
            for place, linear in enumerate((layer.qkv, layer.out, layer.mlp.up, layer.mlp.down)):
                if not isinstance(linear.packed, Matrix):
                    return None
                matrices[index, place] = linear.packed.descriptor
                largest = max(largest, linear.rows * linear.columns)
            for place, norm in enumerate((layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)):
                norms[index, place] = norm.weight.data_ptr() if norm.weight.numel() else 0
        return cls(matrices, norms, largest)


@kernel
def _product(m: Any, x: Any, y: Any) -> None:
    product(m, x, y, 0, (m[ROWS] + BLOCK - 1) // BLOCK)


@kernel
def _apart(m_up: Any, m_down: Any, x: Any, up: Any, active: Any, y: Any) -> None:
    _product(m_up, x, up)
    gated_silu(up, active)
    _product(m_down, active, y)


if HAS_AMX:

    @kernel
    def _feed_forward(m_up: Any, m_down: Any, x: Any, up: Any, active: Any, y: Any) -> None:
        if m_up[KIND] == BFLOAT16_AMX and m_down[KIND] == BFLOAT16_AMX and amx.fits(m_up):
            amx.feed_forward(m_up, m_down, x, y)
        else:
            _apart(m_up, m_down, x, up, active, y)

else:
    _feed_forward = _apart


@kernel
def decode(
    x: Any, matrices: Any, norms: Any, last_norm: Any, heads: int, positions: Any, slots: Any, cos: Any, sin: Any,
    rotated: Any, windows: Any, cache: Any, scale: float, epsilon: float, wanted: Any, out: Any,
) -> None:  # fmt: skip
    """All layers for T tokens of as many sequences as they come from; answers go to `out`, and x is used up.

    Args:
        x: embeddings, float32 [T, hidden].
        matrices: descriptors, int64 [layers, 4, FIELDS], as in `Table`.
        norms: addresses, int64 [layers, 4], as in `Table`.
        last_norm: [hidden].
        heads: query heads.
        positions: int64 [T].
        slots: int64 [T].
        cos: [length, head_dim / 2].
        sin: as cos.
        rotated: bool [layers].
        windows: int64 [layers], 0 = all positions.
        cache: keys and values, [layers, 2, slots, kv_heads, length, head_dim].
        scale: of attention scores.
        epsilon: of norms.
        wanted: int64, ascending: rows whose results are wanted.
        out: float32 [wanted, hidden].
    """
    count, hidden = x.shape
    width = cache.shape[5]
    every = heads + 2 * cache.shape[3]
    twice = matrices[0, _UP, ROWS]
    h, delta = np.empty((count, hidden), np.float32), np.zeros((count, hidden), np.float32)
    qkv, mixed = np.empty((count, every, width), np.float32), np.empty((count, heads, width), np.float32)
    up, active = np.empty((count, twice), np.float32), np.empty((count, twice // 2), np.float32)
    for layer in range(matrices.shape[0]):
        keys, values = cache[layer, 0], cache[layer, 1]
        rms_norm(x, delta, carray(floats_at(norms[layer, 0]), (hidden,)), epsilon, h)
        _product(matrices[layer, _QKV], h, qkv.reshape(count, every * width))
        normed = width if norms[layer, 2] != 0 else 0
        q_norm = carray(floats_at(norms[layer, 2]), (normed,))
        k_norm = carray(floats_at(norms[layer, 3]), (normed,))
        length = cos.shape[0] if rotated[layer] else 0
        rotate_and_store(
            qkv, heads, positions, slots, cos[:length], sin[:length], q_norm, k_norm, epsilon, keys, values
        )
        attend(qkv, 0, count, heads, positions, slots, keys, values, scale, windows[layer], mixed)
        if layer == matrices.shape[0] - 1 and len(wanted) < count:
            # Only these go on to the head: the rest of the last block is not needed.
            count = len(wanted)
            for i in range(count):
                mixed[i], x[i] = mixed[wanted[i]], x[wanted[i]]
            x, h, delta, mixed, up, active = (
                x[:count],
                h[:count],
                delta[:count],
                mixed[:count],
                up[:count],
                active[:count],
            )
        _product(matrices[layer, _OUT], mixed.reshape(count, heads * width), delta)
        rms_norm(x, delta, carray(floats_at(norms[layer, 1]), (hidden,)), epsilon, h)
        _feed_forward(matrices[layer, _UP], matrices[layer, _DOWN], h, up, active, delta)
    rms_norm(x, delta, last_norm, epsilon, out)
