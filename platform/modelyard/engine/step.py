"""A whole step of a decoder as one call: for a few tokens of a small model, calls cost more than what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numba.core import types
from numba.extending import overload

from modelyard.engine import amx
from modelyard.engine.attention import attend_rows
from modelyard.engine.checkpoint import DecoderConfig
from modelyard.engine.jit import kernel, part
from modelyard.engine.kernels import norm_rows, rotate_rows, silu_rows
from modelyard.engine.products import Matrix, room_bytes, run
from modelyard.engine.tiles import BLOCK, DEPTH, FIELDS, ROWS
from modelyard.engine.vectors import keep_line
from modelyard.engine.weights import Mlp, Weights
from modelyard.lanes import address, field

_QKV, _OUT, _UP, _DOWN = range(4)


@dataclass(frozen=True)
class Table:
    """Where the kernels find a model: descriptors [layers, 4, FIELDS] of its matrices, which all have one `form`, and
    addresses [layers, 4] of its norms (before attention, before the feed-forward network, of queries, of keys; 0 =
    none). `largest`: weights of the largest matrix. The addresses are those of `weights`, which has to outlive them.
    """

    form: np.dtype
    matrices: np.ndarray
    norms: np.ndarray
    largest: int

    @classmethod
    def of(cls, weights: Weights) -> Self | None:
        """None for a model that has something else between its products, or products of a library."""
        c = weights.config
        matrices = np.zeros((c.layers, 4, FIELDS), np.int64)
        norms = np.zeros((c.layers, 4), np.int64)
        largest, form = 0, np.dtype(np.void)
        for index, layer in enumerate(weights.layers):
            if c.family == "gpt2" or not isinstance(layer.mlp, Mlp):
                return None
            for place, linear in enumerate((layer.qkv, layer.out, layer.mlp.up, layer.mlp.down)):
                if not isinstance(linear.packed, Matrix):
                    return None
                matrices[index, place] = linear.packed.descriptor
                largest, form = max(largest, linear.rows * linear.columns), linear.packed.form
            for place, norm in enumerate((layer.input_norm, layer.mlp_norm, layer.q_norm, layer.k_norm)):
                norms[index, place] = norm.weight.data_ptr() if norm.weight.numel() else 0
        return cls(form, matrices, norms, largest)


class Room:
    """Memory for what `decode` computes on its way, kept from step to step: the system would clear new memory first.

    `pitch`: bytes from a row of queries, keys and values to the next: never a multiple of 4096, or sums that are
    written to the same column of many rows would drive each other out of the nearest cache.
    """

    def __init__(self, config: DecoderConfig, table: Table, length: int) -> None:
        c = config
        every = (c.heads + 2 * c.kv_heads) * c.head_dim * 4
        self.pitch = every + 64 * (every % 4096 == 0)
        wide = int(table.matrices[:, _UP, ROWS].max())
        self._deepest = int(table.matrices[:, :, DEPTH].max())
        # Of a token: x normed, what is added to x, queries with keys and values, attention, gate and up, activations.
        self._sizes = [c.hidden * 4, c.hidden * 4, self.pitch, c.heads * c.head_dim * 4, wide * 4, wide * 2]
        self._scores = c.heads // c.kv_heads * length * 4
        self._held = np.empty(0, np.uint8)

    def of(self, count: int) -> np.ndarray:
        """Addresses for a step of `count` tokens, int64: of these six, of scores, and of `products.run`'s room."""
        sizes = [count * size for size in self._sizes] + [self._scores, room_bytes(count, self._deepest)]
        starts = np.cumsum([0] + [size + 63 & -64 for size in sizes])
        if len(self._held) < starts[-1] + 64:
            self._held = np.empty(int(starts[-1]) + 64, np.uint8)
        return (self._held.ctypes.data + 63 & -64) + starts[:-1]


@part
def _apart(
    form: Any, up: int, down: int, x: int, count: int, hidden: int, wide: int, active: int, y: int, room: int
) -> None:
    none, twice = np.int64(0), field(up, ROWS)
    run(form, up, x, hidden * 4, count, wide, twice * 4, none, (twice + BLOCK - 1) // BLOCK, room)
    silu_rows(wide, active, count, twice // 2)
    run(form, down, active, twice * 2, count, y, hidden * 4, none, (hidden + BLOCK - 1) // BLOCK, room)


def feed_forward(
    form: Any, up: int, down: int, x: int, count: int, hidden: int, wide: int, active: int, y: int, room: int
) -> None:
    """y = W_down (silu(x G^T) * (x U^T)), for kernels; G and U are halves of the matrix `up`.

    x, y: float32 [count, hidden]. wide: room for the products with `up`; active: for what is made of them.
    """
    raise NotImplementedError("only kernels can call it")


@overload(feed_forward, inline="always")
def _feed_forward(
    form: Any, up: Any, down: Any, x: Any, count: Any, hidden: Any, wide: Any, active: Any, y: Any, room: Any
) -> Any:
    chosen = amx.feed_forward if form.dtype == types.uint32 else _apart

    def implementation(
        form: Any, up: Any, down: Any, x: Any, count: Any, hidden: Any, wide: Any, active: Any, y: Any, room: Any
    ) -> None:
        chosen(form, up, down, x, count, hidden, wide, active, y, room)

    return implementation


@kernel
def decode(
    form: Any, x: Any, matrices: Any, norms: Any, last_norm: Any, heads: int, positions: Any, slots: Any, cos: Any,
    sin: Any, rotated: Any, windows: Any, cache: Any, scale: float, epsilon: float, wanted: Any, pitch: int, rooms: Any,
    out: Any,
) -> None:  # fmt: skip
    """All layers for T tokens of as many sequences as they come from; answers go to `out`, and x is used up.

    Args:
        form: of the matrices' layout (`products.FORMS`).
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
        cache: keys and values, [layers, 2, slots, kv_heads, length, head_dim], float32, or bfloat16 as uint16.
        scale: of attention scores.
        epsilon: of norms.
        wanted: int64, ascending: rows whose results are wanted.
        pitch: as in `Room`.
        rooms: addresses, int64, as in `Room`.
        out: float32 [wanted, hidden].
    """
    count, hidden = x.shape
    kv_heads, length, width, kind, size = cache.shape[3], cache.shape[4], cache.shape[5], cache.dtype, cache.itemsize
    h, delta, qkv, mixed = rooms[0], rooms[1], rooms[2], rooms[3]
    wide, active, scores, room = rooms[4], rooms[5], rooms[6], rooms[7]
    row, line = address(x), hidden * 4
    none = np.int64(0)
    more = none
    for layer in range(matrices.shape[0]):
        m, norm = address(matrices) + layer * 4 * FIELDS * 8, address(norms) + layer * 4 * 8
        keys = address(cache) + layer * cache.strides[0]
        values = keys + cache.strides[1]
        norm_rows(row, more, field(norm, 0), h, count, hidden, epsilon)
        more = delta
        run(form, m, h, line, count, qkv, pitch, none, (field(m, ROWS) + BLOCK - 1) // BLOCK, room)
        turns = address(cos) if rotated[layer] else 0
        rotate_rows(
            kind, qkv, pitch, heads, kv_heads, width, positions, slots, turns, address(sin), cos.shape[1],
            field(norm, 2), field(norm, 3), epsilon, keys, values, length, size,
        )  # fmt: skip
        attend_rows(
            kind, qkv, pitch, none, count, heads, kv_heads, width, positions, slots, keys, values, length, size,
            scale, windows[layer], scores, length * 4, mixed,
        )  # fmt: skip
        if layer == matrices.shape[0] - 1 and len(wanted) < count:
            # Only these go on to the head: the rest of the last block is not needed.
            count = len(wanted)
            for i in range(count):
                keep_line(x.dtype, mixed + wanted[i] * heads * width * 4, mixed + i * heads * width * 4, heads * width)
                keep_line(x.dtype, row + wanted[i] * line, row + i * line, hidden)
        run(
            form, m + _OUT * FIELDS * 8, mixed, heads * width * 4, count, delta, line, none,
            (hidden + BLOCK - 1) // BLOCK, room,
        )  # fmt: skip
        norm_rows(row, delta, field(norm, 1), h, count, hidden, epsilon)
        feed_forward(form, m + _UP * FIELDS * 8, m + _DOWN * FIELDS * 8, h, count, hidden, wide, active, delta, room)
    norm_rows(row, more, address(last_norm), address(out), count, hidden, epsilon)
