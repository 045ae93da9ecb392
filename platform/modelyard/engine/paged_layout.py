"""Where the tokens of a step lie in paged keys and values, and what a decoder does with them in plain PyTorch.

The functions here are the reference of `gpu_kernels` and run on any device.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.scheduler import Piece

Scales = tuple[Tensor, Tensor] | None
"""Of keys and of values."""


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
class Packed:
    """A layout on the host, in one buffer: int32, the tensors of `Layout` one after the other.

    `rows` above 0: one token a sequence, filled up to so many sequences, for a CUDA graph.
    """

    buffer: Tensor
    rows: int
    tokens: int
    sequences: int
    tiles: int
    width: int
    longest: int
    most: int
    tile: int

    @property
    def numbers(self) -> list[int]:
        """All but the buffer, for `empty`."""
        return [self.rows, self.tokens, self.sequences, self.tiles, self.width, self.longest, self.most, self.tile]

    @property
    def sizes(self) -> list[int]:
        """Lengths of the buffer's parts."""
        n, t, s = self.tokens, self.tiles, self.sequences
        return [n, n, n, s + 1, s, t, t, s * self.width]

    @staticmethod
    def empty(numbers: Sequence[int]) -> Packed:
        """A layout of the same shape as one whose `numbers` these are, to be filled."""
        shape = Packed(torch.empty(0), *numbers)
        return Packed(torch.empty(sum(shape.sizes), dtype=torch.int32), *numbers)

    def on(self, there: Tensor) -> Layout:
        """The layout whose buffer lies in `there`."""
        t = torch.split(there, self.sizes)
        tables = t[7].view(self.sequences, self.width)
        return Layout(t[0], t[1], t[2], t[3], t[4], t[5], t[6], tables, self.longest, self.most, self.tile)


class Staging:
    """Lays steps out on the host, and sends each in one copy.

    Args:
        device: where layouts go.
        size: tokens of a block.
        width: blocks of the longest sequence.
        spare: a place in the pool that belongs to no sequence.
        tile_rows: queries of an attention tile, from the most tokens a sequence has in a step.
    """

    def __init__(
        self, device: torch.device, size: int, width: int, spare: int, tile_rows: Callable[[int], int]
    ) -> None:
        self._device, self._size, self._width, self._spare = device, size, width, spare
        self._tile_rows = tile_rows
        self._host = torch.empty(0, dtype=torch.int32)
        self._sent = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def pack(self, pieces: Sequence[Piece], rows: int = 0) -> Packed:
        """The layout of a scheduled step, in the order of `pieces`; with `rows` filled up with spare sequences."""
        size = self._size
        counts = [p.count for p in pieces] + [1] * (rows - len(pieces))
        ends = [p.start + p.count for p in pieces] + [1] * (rows - len(pieces))
        most, longest = max(counts), self._width * size if rows else max(ends)
        tile = self._tile_rows(most)
        tiles = [-(-count // tile) for count in counts]
        many, width = len(counts), -(-longest // size)
        shape = Packed(self._host, rows, sum(counts), many, sum(tiles), width, longest, most, tile)
        buffer = self._reserve(sum(shape.sizes))
        parts = np.split(buffer.numpy(), np.cumsum(shape.sizes)[:-1])
        tokens, positions, mapping, starts, lengths, owners, firsts = parts[:-1]
        tables = parts[-1].reshape(many, width)
        if rows:
            buffer.zero_()
            mapping.fill(self._spare)
        tables.fill(self._spare // size if rows else 0)
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
        return replace(shape, buffer=buffer)

    def place(self, packed: Packed, held: Tensor | None = None) -> Layout:
        """A packed layout on the device; with `held` in that tensor, which a graph reads."""
        buffer = packed.buffer
        there = buffer.to(self._device, non_blocking=True) if held is None else held.copy_(buffer, non_blocking=True)
        if self._sent is not None:
            self._sent.record()
        return packed.on(there)

    def _reserve(self, length: int) -> Tensor:
        """A buffer on the host that the last step's copy has left."""
        if self._sent is None:
            return torch.empty(length, dtype=torch.int32)
        self._sent.synchronize()
        if len(self._host) < length:
            self._host = torch.empty(2 * length, dtype=torch.int32, pin_memory=True)
        return self._host[:length]


FP8 = torch.float8_e4m3fn
FP8_MOST = 448.0
"""The largest number of e4m3."""


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., head_dim] as e4m3, and float32 scales [...] that bring each head's largest number to its largest."""
    scales = x.float().abs().amax(-1).clamp(min=1e-12) / FP8_MOST
    return (x.float() / scales[..., None]).to(FP8), scales


def _read(held: Tensor, scales: Tensor | None, places: Tensor, dtype: torch.dtype) -> Tensor:
    if scales is None:
        return held[places]
    whole = held.view(torch.uint8)[places].view(FP8).float()  # PyTorch's CPU does not index e4m3
    return (whole * scales[places][..., None]).to(dtype)


def gathered(
    q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int, scales: Scales = None
) -> Tensor:
    """Causal attention of a step's tokens over the pool; keys and values are copied into one padded batch first.

    Args:
        q: [T, heads, head_dim].
        keys: [blocks * size, kv_heads, head_dim].
        values: as keys.
        layout: of the step.
        size: tokens of a block.
        window: positions seen at most, 0 = all.
        scales: of keys and values that are kept as e4m3, float32 [blocks * size, kv_heads] each.

    Returns:
        [T, heads, head_dim].
    """
    key_scales, value_scales = scales or (None, None)
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
        _read(keys, key_scales, places, q.dtype).transpose(1, 2),
        _read(values, value_scales, places, q.dtype).transpose(1, 2),
        attn_mask=mask[:, None],
        enable_gqa=heads != keys.shape[1],
    )
    return out.transpose(1, 2)[owner, row]


def rotate_and_store(
    qkv: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None,
    epsilon: float, keys: Tensor, values: Tensor, scales: Scales = None,
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
        scales: float32 [places, kv_heads] each, changed too, where keys and values are kept as e4m3.

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
    for held, held_scales, fresh in zip((keys, values), scales or (None, None), (k, v), strict=True):
        if held_scales is None:
            held.index_copy_(0, mapping, fresh)
        else:
            small, steps = quantize(fresh)
            held.view(torch.uint8).index_copy_(0, mapping, small.view(torch.uint8))
            held_scales.index_copy_(0, mapping, steps)
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
    from modelyard.engine import gpu_kernels

    return gpu_kernels if device.type == "cuda" and gpu_kernels.BUILT else sys.modules[__name__]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
