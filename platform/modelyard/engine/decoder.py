"""The forward pass: a Llama-family decoder over contiguous key/value slots, in plain PyTorch on a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.checkpoint import DecoderConfig
from modelyard.engine.rope import rotations
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.weights import Layer, Weights

BUCKET = 32
"""Attended lengths are rounded up to this many tokens, so that shapes repeat from step to step."""


@dataclass(frozen=True)
class _Chunk:
    """Rows `first .. first+count` of a step: `count` tokens of one slot from position `start`."""

    first: int
    count: int
    slot: int
    start: int
    mask: Tensor


@dataclass(frozen=True)
class StepBatch:
    """One step, flat: T tokens of which the first `singles` are one token of a sequence each, by slot.

    `tokens`, `positions`, `slots`: int64 [T]. `last`: rows whose logits are wanted, `sampled` their
    sequences. The singles attend to `height` rows of the cache and `length` positions under `mask`, float32
    [height, 1, 1, length].
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    last: Tensor
    sampled: tuple[Sequence, ...]
    singles: int
    height: int
    length: int
    mask: Tensor
    chunks: tuple[_Chunk, ...]

    @property
    def dense(self) -> bool:
        """Whether the singles are exactly the rows 0 .. height-1 of the cache."""
        return self.singles == self.height


class Cache:
    """Keys and values of all slots: [layers, 2, slots, kv_heads, length, head_dim] float32.

    Zero-filled lazily by the operating system, so memory is used only as sequences grow. Values must stay
    finite even where masked: a weight of zero times NaN would be NaN.
    """

    def __init__(self, config: DecoderConfig, slots: int, length: int) -> None:
        length = -(-length // BUCKET) * BUCKET
        self.data = torch.zeros(config.layers, 2, slots, config.kv_heads, length, config.head_dim)

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of a slot."""
        self.data[:, :, target, :, :tokens] = self.data[:, :, source, :, :tokens]

    def clear(self, slot: int) -> None:
        """Zeroes a slot after a sequence that produced NaN or infinity."""
        self.data[:, :, slot] = 0


class Decoder:
    """Computes logits for a step and keeps keys and values."""

    def __init__(self, weights: Weights, slots: int, length: int) -> None:
        self.weights, self.config = weights, weights.config
        self.cache = Cache(self.config, slots, length)
        self.rotations = rotations(self.config.rope, self.config.head_dim, length)

    def batch(self, pieces: list[Piece]) -> StepBatch:
        """Lays a scheduled step out flat, singles first by slot, then chunks in the given order."""
        singles = sorted((p for p in pieces if p.count == 1), key=lambda p: p.sequence.slot)
        ordered = singles + [p for p in pieces if p.count > 1]
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last: list[int] = []
        chunks: list[_Chunk] = []
        for piece in ordered:
            sequence, start, end = piece.sequence, piece.start, piece.start + piece.count
            if piece.count > 1:
                mask = _causal(start, piece.count)
                chunks.append(_Chunk(len(tokens), piece.count, sequence.slot, start, mask))
            tokens += sequence.tokens[start:end]
            positions += range(start, end)
            slots += [sequence.slot] * piece.count
            if piece.last:
                last.append(len(tokens) - 1)
        height = max((p.sequence.slot for p in singles), default=-1) + 1
        length = -(-(max(positions[: len(singles)], default=-1) + 1) // BUCKET) * BUCKET
        position, slot = torch.tensor(positions), torch.tensor(slots)
        return StepBatch(
            tokens=torch.tensor(tokens),
            positions=position,
            slots=slot,
            last=torch.tensor(last, dtype=torch.int64),
            sampled=tuple(p.sequence for p in ordered if p.last),
            singles=len(singles),
            height=height,
            length=length,
            mask=_single_mask(position[: len(singles)], slot[: len(singles)], height, length),
            chunks=tuple(chunks),
        )

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Logits [len(batch.last), vocabulary] float32; keys and values of all T tokens enter the cache."""
        w, eps = self.weights, self.config.norm_epsilon
        x = F.embedding(batch.tokens, w.embed)
        rotation = self.rotations[batch.positions].unsqueeze(1)
        for index, layer in enumerate(w.layers):
            x = x + self._attention(index, layer, _norm(x, layer.input_norm, eps), rotation, batch)
            if index == len(w.layers) - 1 and len(batch.last) < len(batch.tokens):
                x = x[batch.last]  # only these go on to the head: the rest of the last block is not needed
            gate, up = layer.gate_up(_norm(x, layer.mlp_norm, eps)).chunk(2, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        return w.head(_norm(x, w.norm, eps))

    def _attention(self, index: int, layer: Layer, x: Tensor, rotation: Tensor, batch: StepBatch) -> Tensor:
        c = self.config
        qkv = layer.qkv(x).view(-1, c.heads + 2 * c.kv_heads, c.head_dim)
        qk, v = qkv[:, : c.heads + c.kv_heads], qkv[:, c.heads + c.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            q_normed = _norm(qk[:, : c.heads], layer.q_norm, c.norm_epsilon)
            qk = torch.cat((q_normed, _norm(qk[:, c.heads :], layer.k_norm, c.norm_epsilon)), dim=1)
        pairs = torch.view_as_complex(qk.view(*qk.shape[:-1], -1, 2))
        qk = torch.view_as_real(pairs * rotation).flatten(-2)
        keys, values = self.cache.data[index]
        keys[batch.slots, :, batch.positions] = qk[:, c.heads :]
        values[batch.slots, :, batch.positions] = v
        parts = []
        if batch.singles:
            parts.append(self._singles(qk[: batch.singles, : c.heads], keys, values, batch))
        for chunk in batch.chunks:
            q = qk[chunk.first : chunk.first + chunk.count, : c.heads]
            end = chunk.start + chunk.count
            parts.append(self._chunk(q, keys[chunk.slot, :, :end], values[chunk.slot, :, :end], chunk))
        return layer.out(parts[0] if len(parts) == 1 else torch.cat(parts))

    def _singles(self, q: Tensor, keys: Tensor, values: Tensor, batch: StepBatch) -> Tensor:
        """Attention of one token a sequence. q: [singles, heads, head_dim].

        The heads that share a key head stand in for query positions, so grouped-query attention needs
        no repeated keys. The cache rows are read in place.
        """
        c, n = self.config, batch.singles
        q = q.reshape(n, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        rows = batch.slots[:n]
        if not batch.dense:
            q = q.new_zeros(batch.height, *q.shape[1:]).index_copy_(0, rows, q)
        k, v = keys[: batch.height, :, : batch.length], values[: batch.height, :, : batch.length]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=batch.mask)
        if not batch.dense:
            out = out[rows]
        return out.reshape(n, -1)

    def _chunk(self, q: Tensor, keys: Tensor, values: Tensor, chunk: _Chunk) -> Tensor:
        """Attention of consecutive tokens of one sequence. q: [n, heads, head_dim]; keys: [kv_heads, end, head_dim]."""
        c = self.config
        out = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys[None],
            values[None],
            attn_mask=chunk.mask,
            enable_gqa=c.heads != c.kv_heads,
        )
        return out[0].transpose(0, 1).reshape(chunk.count, -1)


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, epsilon)


def _causal(start: int, count: int) -> Tensor:
    """Additive mask [count, start + count]: token i sees everything up to position start + i."""
    return torch.full((count, start + count), -torch.inf).triu_(start + 1)


def _single_mask(positions: Tensor, slots: Tensor, height: int, length: int) -> Tensor:
    """Additive mask [height, 1, 1, length]; rows without a token see position 0, to stay finite."""
    ends = torch.zeros(height, dtype=torch.int64).index_copy_(0, slots, positions)
    mask = torch.zeros(height, length).masked_fill_(torch.arange(length) > ends[:, None], -torch.inf)
    return mask[:, None, None]
