"""Where the tokens of a step lie in paged keys and values, and what a decoder does with them in plain PyTorch.

The functions here are the reference of `gpu_kernels` and run on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.scheduler import Piece


@dataclass(frozen=True)
class Layout:
    """A step of T tokens of S sequences, cut into attention tiles of at most `tile` queries of one sequence.

    All int32: `tokens`, `positions` and `mapping` [T], the place of each token in the pool (block * size + offset);
    `starts` [S + 1]: first token of each sequence in the step; `lengths` [S]: tokens to attend to, those of this step
    included; `owners` and `firsts`, one a tile: its sequence, and its first query counted from the sequence's first;
    `tables` [S, blocks]: block tables, padded with block 0. `longest` of the lengths, and `most` tokens of a sequence.
    """

    tokens: Tensor
    positions: Tensor
    mapping: Tensor
    starts: Tensor
    lengths: Tensor
    owners: Tensor
    firsts: Tensor
    tables: Tensor
    longest: int
    most: int
    tile: int


@dataclass(frozen=True)
class Fixed:
    """A layout of one token a sequence whose tensors stay where they are: what a CUDA graph reads.

    `rows` sequences and tables of `width` blocks; sequences that a step has not get one token, at place `spare`.
    """

    rows: int
    width: int
    spare: int
    held: Tensor


class Staging:
    """One buffer on the host for everything a step sends, so that it travels in one copy.

    Args:
        device: where layouts go.
        size: tokens of a block.
        tile_rows: queries of an attention tile, from the most tokens a sequence has in a step.
    """

    def __init__(self, device: torch.device, size: int, tile_rows: Callable[[int], int]) -> None:
        self._device, self._size, self._tile_rows = device, size, tile_rows
        self._host = torch.empty(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def fixed(self, rows: int, width: int, spare: int) -> tuple[Fixed, Layout]:
        """A place for steps of up to `rows` sequences, filled with none, and its layout."""
        held = torch.empty(sum(_sizes(rows, rows, rows, rows * width)), dtype=torch.int32, device=self._device)
        fixed = Fixed(rows, width, spare, held)
        return fixed, self.layout((), fixed)

    def layout(self, pieces: Sequence[Piece], fixed: Fixed | None = None) -> Layout:
        """The layout of a scheduled step, in the order of `pieces`, on the device."""
        size = self._size
        counts = [p.count for p in pieces] + [1] * (fixed.rows - len(pieces) if fixed else 0)
        ends = [p.start + p.count for p in pieces] + [1] * (len(counts) - len(pieces))
        most, longest = max(counts), fixed.width * size if fixed else max(ends)
        tile = self._tile_rows(most)
        tiles = [-(-count // tile) for count in counts]
        many, width = len(counts), -(-longest // size)
        sizes = _sizes(sum(counts), many, sum(tiles), many * width)
        buffer = self._reserve(sum(sizes))
        parts = np.split(buffer.numpy(), np.cumsum(sizes)[:-1])
        tokens, positions, mapping, starts, lengths, owners, firsts = parts[:-1]
        tables = parts[-1].reshape(many, width)
        if fixed:
            buffer.zero_()
            mapping.fill(fixed.spare)
        tables.fill(fixed.spare // size if fixed else 0)
        starts[0] = 0
        np.cumsum(counts, out=starts[1:])
        lengths[:] = ends
        owners[:] = np.repeat(np.arange(many), tiles)
        firsts[:] = np.concatenate([np.arange(n) for n in tiles]) * tile if most > 1 else 0
        for index, piece in enumerate(pieces):
            blocks = piece.sequence.blocks[: -(-ends[index] // size)]
            tables[index, : len(blocks)] = blocks
        if most == 1:
            places = [p.start for p in pieces]
            n = len(places)
            tokens[:n], positions[:n] = [p.sequence.tokens[p.start] for p in pieces], places
            mapping[:n] = [p.sequence.blocks[p.start // size] * size + p.start % size for p in pieces]
        else:
            tokens[:] = [token for p in pieces for token in p.tokens]
            for index, p in enumerate(pieces):
                here, at = slice(starts[index], starts[index + 1]), np.arange(p.start, ends[index])
                positions[here] = at
                mapping[here] = tables[index, at // size] * size + at % size
        there = fixed.held.copy_(buffer, non_blocking=True) if fixed else buffer.to(self._device, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        t = torch.split(there, sizes)
        return Layout(t[0], t[1], t[2], t[3], t[4], t[5], t[6], t[7].view(many, width), longest, most, tile)

    def _reserve(self, length: int) -> Tensor:
        """A buffer on the host that the last step's copy has left."""
        if self._sent is None:
            return torch.empty(length, dtype=torch.int32)
        self._sent.synchronize()
        if len(self._host) < length:
            self._host = torch.empty(2 * length, dtype=torch.int32, pin_memory=True)
        return self._host[:length]


def _sizes(tokens: int, sequences: int, tiles: int, blocks: int) -> list[int]:
    """Lengths of a layout's tensors, in their order."""
    return [tokens, tokens, tokens, sequences + 1, sequences, tiles, tiles, blocks]


def gathered(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int) -> Tensor:
    """Causal attention of a step's tokens over the pool; keys and values are copied into one padded batch first.

    Args:
        q: [T, heads, head_dim].
        keys: [blocks * size, kv_heads, head_dim].
        values: as keys.
        layout: of the step.
        size: tokens of a block.
        window: positions seen at most, 0 = all.

    Returns:
        [T, heads, head_dim].
    """
    count, heads, width = q.shape
    sequences = len(layout.lengths)
    places = (layout.tables.long()[:, :, None] * size + torch.arange(size, device=q.device)).flatten(1)
    fresh = layout.starts.diff().long()
    owner = torch.repeat_interleave(torch.arange(sequences, device=q.device), fresh, output_size=count)
    row = torch.arange(count, device=q.device) - layout.starts[owner]
    padded = q.new_zeros(sequences, layout.most, heads, width)
    padded[owner, row] = q
    # Query i of n stands at position length - n + i.
    position = (layout.lengths - fresh)[:, None] + torch.arange(layout.most, device=q.device)
    seen = torch.arange(places.shape[1], device=q.device)
    mask = seen <= position[..., None]
    if window:
        mask &= seen > position[..., None] - window
    out = F.scaled_dot_product_attention(
        padded.transpose(1, 2),
        keys[places].transpose(1, 2),
        values[places].transpose(1, 2),
        attn_mask=mask[:, None],
        enable_gqa=heads != keys.shape[1],
    )
    return out.transpose(1, 2)[owner, row]


def rotate_and_store(
    qkv: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None,
    epsilon: float, keys: Tensor, values: Tensor,
) -> Tensor:  # fmt: skip
    """Norms and rotates queries and keys, and puts keys and values into the pool.

    Args:
        qkv: [T, heads + 2 kv_heads, head_dim].
        layout: of the step.
        rotation: cosines and sines, float32 [positions, head_dim / 2]; None = no rotation.
        norms: weights [head_dim] of the queries' and the keys' RMS norm; None = no norm.
        epsilon: of the norms.
        keys: [places, kv_heads, head_dim], changed at the tokens' places.
        values: as keys.

    Returns:
        Queries [T, heads, head_dim].
    """
    kv = keys.shape[1]
    q, k, v = torch.split(qkv, [qkv.shape[1] - 2 * kv, kv, kv], dim=1)
    if norms is not None:
        q, k = (F.rms_norm(x, w.shape, w, epsilon) for x, w in zip((q, k), norms, strict=True))
    if rotation is not None:
        cos, sin = (table[layout.positions][:, None] for table in rotation)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    mapping = layout.mapping.long()
    keys.index_copy_(0, mapping, k)
    values.index_copy_(0, mapping, v)
    return q


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """`x += delta`, in place; the RMS norm of x. [rows, hidden] each."""
    if delta is not None:
        x += delta
    return F.rms_norm(x, weight.shape, weight, epsilon)


def gated_silu(up: Tensor) -> Tensor:
    """`silu(gate) * up` of [rows, 2 x width], gate first: [rows, width]."""
    gate, up = up.chunk(2, dim=-1)
    return F.silu(gate) * up


def tile_rows(group: int, most: int) -> int:
    """The reference knows no tiles."""
    return most


attend = gathered


def operations(device: torch.device) -> Any:
    """The module of functions for a device: `gpu_kernels` where there is CUDA with Triton, else this one."""
    import importlib
    import sys

    if device.type == "cuda":
        try:
            return importlib.import_module("modelyard.engine.gpu_kernels")
        except ImportError:  # PyTorch for CUDA brings Triton, except on Windows
            pass
    return sys.modules[__name__]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
