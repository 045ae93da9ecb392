"""The forward pass over paged keys and values, for a GPU (`device: cuda`).

The cache is one pool of blocks; a sequence's block table says where its tokens lie, and sharing a prefix is sharing its
blocks, without a copy. Weights live on the device in the type that is computed with. Steps in which every sequence has
one token are replayed as CUDA graphs by batch size. `paged_layout` holds the same operations in plain PyTorch, which
the tests run on a CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.adapters import Adapter, Groups, product
from modelyard.engine.batch import StepBatch
from modelyard.engine.checkpoint import DecoderConfig
from modelyard.engine.experts import mix
from modelyard.engine.paged_layout import FP8, Layout, Packed, Staging, operations
from modelyard.engine.rope import rotations
from modelyard.engine.weights import Layer, Mlp, Norm, Weights

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Batch sizes whose decode step is captured as a CUDA graph; a step is padded to the next one."""


@dataclass(frozen=True)
class _Graph:
    """A captured decode step: a replay reads the layout in `held` and leaves its result in `hidden` [rows, hidden]."""

    graph: Any
    held: Tensor
    hidden: Tensor


class PagedDecoder:
    """A decoder over paged keys and values, with the interface of `decoder.Decoder`.

    Args:
        weights: a loaded model, unpacked, on the device and in the type it computes in.
        blocks: key/value blocks of the pool.
        size: tokens of a block.
        length: positions covered.
        total: sums a tensor over the workers that hold slices of the model, in place; None = it is whole.
        fp8: whether keys and values are kept as e4m3, with a scale a token and head.
    """

    def __init__(
        self, weights: Weights, blocks: int, size: int, length: int, total: Callable[[Tensor], Tensor] | None = None,
        *, fp8: bool = False,
    ) -> None:  # fmt: skip
        c: DecoderConfig = weights.config
        self.weights, self.config, self._size = weights, c, size
        self.device, self.dtype = weights.embed.device, weights.embed.dtype
        self._do = operations(self.device)
        self._rotation: tuple[Tensor, Tensor] | None = None
        if c.rope is not None:
            cos, sin = rotations(c.rope, c.head_dim, length)
            self._rotation = cos.to(self.device), sin.to(self.device)
        # One more block than the scheduler knows: graph padding writes there.
        shape = (c.layers, 2, (blocks + 1) * size, c.kv_heads, c.head_dim)
        self._pool = torch.zeros(shape, device=self.device, dtype=torch.uint8 if fp8 else self.dtype)
        self._scales: Tensor | None = None
        if fp8:
            self._pool = self._pool.view(FP8)
            self._scales = torch.zeros(shape[:-1], device=self.device)
        self._total = total
        group = c.heads // c.kv_heads
        self._staging = Staging(
            self.device, size, -(-length // size), blocks * size, lambda most: self._do.tile_rows(group, most)
        )
        # Experts wait for the host to know how many tokens each has: no graph can hold that.
        self._graphs: dict[int, _Graph] | None = {} if self.device.type == "cuda" and c.experts is None else None

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Normed results of the last layer for the wanted rows, [wanted, hidden]."""
        pieces, rows = batch.pieces, 0
        single = all(p.count == 1 for p in pieces) and not batch.adapters
        if self._graphs is not None and single and len(pieces) <= GRAPH_SIZES[-1]:
            rows = next(s for s in GRAPH_SIZES if s >= len(pieces))
        packed = self._staging.pack(pieces, rows)
        self.send(packed, batch.adapters)
        hidden = self.compute(packed, self.placed(batch.adapters))[: batch.positions.size]
        return hidden if batch.wanted is None else hidden[batch.wanted.to(self.device)]

    def send(self, packed: Packed, groups: Groups = ()) -> None:
        """Tells the workers of other slices of a step and its adapters; here there are none."""

    def adopt(self, adapter: Adapter) -> None:
        """Lets steps use an adapter; where the model is cut, tells the workers of the other slices."""

    @torch.inference_mode()
    def compute(self, packed: Packed, groups: Groups = ()) -> Tensor:
        """Normed results of the last layer for all tokens of a step, [tokens, hidden]."""
        if not packed.rows:
            return self._run(self._staging.place(packed), groups)
        assert self._graphs is not None
        if packed.rows not in self._graphs:
            self._graphs[packed.rows] = self._capture(packed)
        held = self._graphs[packed.rows]
        self._staging.place(packed, held.held)
        held.graph.replay()
        return held.hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, float32 [rows, vocabulary], on the device."""
        head = self.weights.head.weight
        assert head is not None
        if self.device.type == "cuda" and self.dtype != torch.float32:
            # Scores rounded to bfloat16 would tie, and greedy choices with them.
            return torch.mm(hidden, head.T, out_dtype=torch.float32)
        return F.linear(hidden, head).float()

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces tensors by name, in place. Raises DataError for an unknown or misshapen one."""
        self.weights.update(tensors, place="update_weights")

    def vectors(self, hidden: Tensor) -> Tensor:
        """What embeddings are made of."""
        return hidden.float().cpu()

    def close(self) -> None:
        """Ends what the decoder started; here there is nothing."""

    def placed(self, groups: Groups) -> Groups:
        """Adapters and their rows on the device."""
        device, dtype = self.device, self.dtype
        return tuple((a.on(device, dtype), None if rows is None else rows.to(device)) for a, rows in groups)

    def _run(self, layout: Layout, groups: Groups = ()) -> Tensor:
        w = self.weights
        x = F.embedding(layout.tokens, w.embed)
        if len(w.positions):
            x = x + w.positions[layout.positions]
        delta: Tensor | None = None
        for i, layer in enumerate(w.layers):
            h = self._norm(x, delta, layer.input_norm)
            delta = self._attention(i, layer, h, layout, groups)
            h = self._norm(x, delta, layer.mlp_norm)
            delta = self._feed_forward(i, layer, h, groups)
        return self._norm(x, delta, w.norm)

    def _norm(self, x: Tensor, delta: Tensor | None, norm: Norm) -> Tensor:
        """`x += delta`, in place; the norm of x."""
        if not norm.bias.numel():
            normed: Tensor = self._do.add_norm(x, delta, norm.weight, self.config.norm_epsilon)
            return normed
        if delta is not None:
            x += delta
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, self.config.norm_epsilon)

    def _attention(self, i: int, layer: Layer, h: Tensor, layout: Layout, groups: Groups) -> Tensor:
        c = self.config
        qkv = product(layer.qkv, (i, "qkv"), h, groups).view(len(h), -1, c.head_dim)
        keys, values = self._pool[i]
        scales = None if self._scales is None else (self._scales[i, 0], self._scales[i, 1])
        q = self._do.rotate_and_store(
            qkv, layout, self._rotation if c.rotated[i] else None,
            (layer.q_norm.weight, layer.k_norm.weight) if c.qk_norm else None, c.norm_epsilon, keys, values, scales,
        )  # fmt: skip
        mixed = self._do.attend(q, keys, values, layout, self._size, c.windows[i], scales)
        return self._whole(product(layer.out, (i, "out"), mixed.view(len(h), -1), groups))

    def _whole(self, part: Tensor) -> Tensor:
        return part if self._total is None else self._total(part)

    def _feed_forward(self, i: int, layer: Layer, h: Tensor, groups: Groups) -> Tensor:
        def run(mlp: Mlp, name: str, rows: Tensor, those: Groups) -> Tensor:
            up = product(mlp.up, (i, name + "up"), rows, those)
            return product(mlp.down, (i, name + "down"), self._activate(up), those)

        if isinstance(layer.mlp, Mlp):
            return self._whole(run(layer.mlp, "", h, groups))
        assert self.config.experts is not None
        return self._whole(mix(layer.mlp, self.config.experts, i, h, groups, run))

    def _activate(self, up: Tensor) -> Tensor:
        if self.config.family == "gpt2":
            return F.gelu(up, approximate="tanh")
        active: Tensor = self._do.gated_silu(up)
        return active

    def _capture(self, packed: Packed) -> _Graph:
        held = torch.empty(packed.buffer.shape, dtype=torch.int32, device=self.device)
        layout = self._staging.place(packed, held)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries and kernels must have set themselves up before the capture
            self._run(layout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Whatever else this thread does to the device spoils a capture, and collecting an engine that is gone, with its
        # graphs, does; other threads (a trainer's) may go on.
        collecting = gc.isenabled()
        gc.disable()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                hidden = self._run(layout)
        finally:
            if collecting:
                gc.enable()
        return _Graph(graph, held, hidden)
