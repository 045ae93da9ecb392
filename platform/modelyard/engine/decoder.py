"""The forward pass on a CPU: matrix products by PyTorch, what lies between them by fused kernels."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine import attention, kernels, products
from modelyard.engine.adapters import Groups, product
from modelyard.engine.batch import Chunk, StepBatch
from modelyard.engine.cache import EMPTY, Cache
from modelyard.engine.experts import mix
from modelyard.engine.products import shares
from modelyard.engine.rope import rotations
from modelyard.engine.step import Room, Table, decode
from modelyard.engine.weights import Layer, Mlp, Norm, Weights

PARALLEL_WORK = 4096
"""Attended positions in a step from which several threads share its attention."""


class Decoder:
    """Computes the last layer's results for a step and keeps keys and values.

    Args:
        weights: the model.
        cache: keys and values of this model.
        length: positions covered.
        threads: of PyTorch, and of the attention kernel in large steps.
    """

    def __init__(self, weights: Weights, cache: Cache, length: int, threads: int = 1) -> None:
        self.weights, self.config, self.cache = weights, weights.config, cache
        self._gated = self.config.family != "gpt2"
        self._scale = self.config.head_dim**-0.5
        self._cos, self._sin = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
        if self.config.rope is not None:
            cos, sin = rotations(self.config.rope, self.config.head_dim, length)
            self._cos, self._sin = cos.numpy(), sin.numpy()
        self._rotated, self._windows = np.array(self.config.rotated), np.array(self.config.windows, np.int64)
        self._table: Table | None = None
        self._room: Room | None = None
        self._packings = -1
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Normed results of the last layer for the wanted rows, float32 [wanted, hidden]."""
        w, groups = self.weights, batch.adapters
        x = F.embedding(batch.tokens, w.embed)
        table = self._whole(batch)
        if table is not None:
            return self._decode(table, x, batch)
        if len(w.positions):
            x = x + w.positions[torch.from_numpy(batch.positions)]
        h, delta = torch.empty_like(x), EMPTY
        xs, hs = x.numpy(), h.numpy()
        for index, layer in enumerate(w.layers):
            self._norm(xs, delta, layer.input_norm, hs)
            delta = self._attention(index, layer, h, batch)
            if index == len(w.layers) - 1 and batch.wanted is not None:
                # Only these go on to the head: the rest of the last block is not needed.
                x, delta = x[batch.wanted], delta[batch.wanted.numpy()]
                h, groups = torch.empty_like(x), batch.adapters_wanted
                xs, hs = x.numpy(), h.numpy()
            self._norm(xs, delta, layer.mlp_norm, hs)
            delta = self._feed_forward(index, layer, h, groups)
        self._norm(xs, delta, w.norm, hs)
        return h

    def _whole(self, batch: StepBatch) -> Table | None:
        """What `step.decode` computes this step with, where one thread can and nothing else takes part."""
        w = self.weights
        if self._packings != w.packings:
            self._table, self._packings = Table.of(w), w.packings
            length = self.cache.slots.shape[-2]
            self._room = Room(self.config, self._table, length) if self._table else None
        if self._table is None or batch.chunks or batch.adapters:
            return None
        if self._threads > 1:
            rows = len(batch.tokens)
            if shares(self._table.largest, rows, 2) > 1 or int(batch.positions.sum()) >= PARALLEL_WORK:
                return None
        return self._table

    def _decode(self, table: Table, x: Tensor, batch: StepBatch) -> Tensor:
        c, wanted = self.config, np.arange(len(x)) if batch.wanted is None else batch.wanted.numpy()
        assert self._room is not None
        out = torch.empty(len(wanted), c.hidden)
        decode(
            table.form, x.numpy(), table.matrices, table.norms, self.weights.norm.arrays[0], c.heads, batch.positions,
            batch.slots, self._cos, self._sin, self._rotated, self._windows, self.cache.slots, self._scale,
            c.norm_epsilon, wanted, self._room.pitch, self._room.of(len(x)), out.numpy(),
        )  # fmt: skip
        return out

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, float32 [rows, vocabulary]. hidden: [rows, hidden]."""
        return self.weights.head(hidden)

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces tensors by name. Raises DataError for an unknown or misshapen one."""
        self.weights.update(tensors, place="update_weights")

    def vectors(self, hidden: Tensor) -> Tensor:
        """What embeddings are made of."""
        return hidden

    def _norm(self, x: np.ndarray, delta: np.ndarray, norm: Norm, out: np.ndarray) -> None:
        """x += delta; out = norm(x)."""
        weight, bias = norm.arrays
        if len(bias):
            kernels.layer_norm(x, delta, weight, bias, self.config.norm_epsilon, out)
        else:
            kernels.rms_norm(x, delta, weight, self.config.norm_epsilon, out)

    def _attention(self, index: int, layer: Layer, h: Tensor, batch: StepBatch) -> np.ndarray:
        c = self.config
        count = len(batch.tokens)
        qkv = product(layer.qkv, (index, "qkv"), h, batch.adapters).view(count, -1, c.head_dim)
        keys, values = self.cache.slots[index]
        q_norm, k_norm = layer.q_norm.arrays[0], layer.k_norm.arrays[0]
        cos, sin = (self._cos, self._sin) if c.rotated[index] else (EMPTY, EMPTY)
        array = qkv.numpy()
        kernels.rotate_and_store(
            array, c.heads, batch.positions, batch.slots, cos, sin, q_norm, k_norm, c.norm_epsilon, keys, values
        )
        mixed = torch.empty(count, c.heads, c.head_dim)
        if batch.short:
            self._attend(array, batch, keys, values, c.windows[index], mixed.numpy())
        for chunk in batch.chunks:
            mixed[chunk.first : chunk.first + chunk.count] = self._chunk(qkv, index, chunk)
        return product(layer.out, (index, "out"), mixed.view(count, -1), batch.adapters).numpy()

    def _attend(
        self, qkv: np.ndarray, batch: StepBatch, keys: np.ndarray, values: np.ndarray, window: int, out: np.ndarray
    ) -> None:
        c, rows = self.config, batch.short

        def part(first: int, last: int) -> None:
            attention.attend(
                qkv, first, last, c.heads, batch.positions, batch.slots, keys, values, self._scale, window, out
            )

        if self._pool is None or rows == 1 or int(batch.positions[:rows].sum()) < PARALLEL_WORK:
            part(0, rows)
            return
        edges = [rows * i // self._threads for i in range(self._threads + 1)]
        for done in [self._pool.submit(part, a, b) for a, b in pairwise(edges) if a < b]:
            done.result()

    def _chunk(self, qkv: Tensor, index: int, chunk: Chunk) -> Tensor:
        """Attention of consecutive tokens of one sequence: [count, heads, head_dim]."""
        c, end = self.config, chunk.start + chunk.count
        q = qkv[chunk.first : chunk.first + chunk.count, : c.heads].transpose(0, 1)[None]
        keys, values = self.cache.data[index, :, chunk.slot, :, :end].float()
        mask = None
        if chunk.start or (c.windows[index] and c.windows[index] < end):
            mask = _mask(chunk.start, chunk.count, c.windows[index])
        out = F.scaled_dot_product_attention(
            q, keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=c.heads != c.kv_heads
        )
        return out[0].transpose(0, 1)

    def _feed_forward(self, index: int, layer: Layer, h: Tensor, groups: Groups) -> np.ndarray:
        def run(mlp: Mlp, name: str, rows: Tensor, those: Groups) -> Tensor:
            if self._gated and not those:
                together = products.feed_forward(mlp.up.packed, mlp.down.packed, rows)
                if together is not None:
                    return together
            up = product(mlp.up, (index, name + "up"), rows, those)
            return product(mlp.down, (index, name + "down"), self._activate(up), those)

        if isinstance(layer.mlp, Mlp):
            return run(layer.mlp, "", h, groups).numpy()
        assert self.config.experts is not None
        return mix(layer.mlp, self.config.experts, index, h, groups, run).numpy()

    def _activate(self, up: Tensor) -> Tensor:
        if not self._gated:
            return F.gelu(up, approximate="tanh")
        out = torch.empty(up.shape[0], up.shape[1] // 2)
        kernels.gated_silu(up.numpy(), out.numpy())
        return out


def _mask(start: int, count: int, window: int) -> Tensor:
    """Additive mask [count, start + count]: token i sees positions up to start + i, at most `window` of them."""
    mask = torch.full((count, start + count), -torch.inf).triu_(start + 1)
    if window:
        mask += torch.full_like(mask, -torch.inf).tril_(start - window)
    return mask
