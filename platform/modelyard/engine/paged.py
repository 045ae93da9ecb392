"""Paged keys and values, and the forward pass over them on a GPU (`device: cuda`).

The cache is one pool of blocks; a sequence's block table says where its tokens lie, and sharing a prefix is sharing its
blocks, without a copy. Attention reads through the table by `torch.nn.attention.varlen.varlen_attn` where this
PyTorch has it with a block table on CUDA; elsewhere (torch 2.11, a CPU) keys are gathered and attended in one masked
product. The gathered path is what the tests run; the CUDA one has not been run on a GPU here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.batch import StepBatch
from modelyard.engine.checkpoint import DecoderConfig
from modelyard.engine.rope import rotations
from modelyard.engine.scheduler import Piece
from modelyard.engine.weights import Mlp, Weights
from modelyard.errors import DataError

GRAPH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Batch sizes whose decode step is captured as a CUDA graph; a step is padded to the next one."""


@dataclass
class Layout:
    """Where the tokens of a step lie in the pool, for S sequences and T tokens.

    `mapping` int64 [T]: place of each token (block * size + offset). `tables` int32 [S, blocks]: block tables, padded
    with block 0. `starts` int32 [S + 1]: first token of each sequence in the step. `lengths` int32 [S]: tokens to
    attend to, those of this step included. `longest` of them, and `most` tokens of a sequence in the step.
    """

    mapping: Tensor
    tables: Tensor
    starts: Tensor
    lengths: Tensor
    longest: int
    most: int

    def to(self, device: torch.device) -> Layout:
        """The same on another device."""
        return replace(
            self,
            mapping=self.mapping.to(device, non_blocking=True),
            tables=self.tables.to(device, non_blocking=True),
            starts=self.starts.to(device, non_blocking=True),
            lengths=self.lengths.to(device, non_blocking=True),
        )


def lay_out_blocks(pieces: Iterable[Piece], size: int) -> Layout:
    """The layout of a scheduled step, in the order of `pieces`."""
    mapping: list[int] = []
    starts, lengths, tables = [0], [], []
    for piece in pieces:
        blocks, end = piece.sequence.blocks, piece.start + piece.count
        mapping += [blocks[p // size] * size + p % size for p in range(piece.start, end)]
        starts.append(starts[-1] + piece.count)
        lengths.append(end)
        tables.append(blocks[: -(-end // size)])
    width = max(len(t) for t in tables)
    return Layout(
        mapping=torch.tensor(mapping),
        tables=torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        longest=max(lengths),
        most=max(b - a for a, b in pairwise(starts)),
    )


@cache
def has_paged_varlen() -> bool:
    """Whether this PyTorch attends through a block table."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"block_table", "seqused_k"} <= set(inspect.signature(varlen_attn).parameters)


def attend(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int) -> Tensor:
    """Causal attention of a step's tokens over the pool.

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
    if q.is_cuda and has_paged_varlen():
        return _varlen(q, keys, values, layout, size, window)
    return gathered(q, keys, values, layout, size, window)


def _varlen(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    paged = (-1, size, *keys.shape[1:])
    out: Any = varlen_attn(
        q, keys.view(paged), values.view(paged), layout.starts, None, layout.most, layout.longest,
        window_size=(window - 1 if window else -1, 0), enable_gqa=q.shape[1] != keys.shape[1],
        block_table=layout.tables, seqused_k=layout.lengths,
    )  # fmt: skip
    return out if isinstance(out, Tensor) else out[0]


def gathered(q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int) -> Tensor:
    """See `attend`: keys and values copied into one padded batch first."""
    count, heads, width = q.shape
    sequences = len(layout.lengths)
    places = (layout.tables.long()[:, :, None] * size + torch.arange(size, device=q.device)).flatten(1)
    owner = torch.repeat_interleave(
        torch.arange(sequences, device=q.device), layout.starts.diff().long(), output_size=count
    )
    row = torch.arange(count, device=q.device) - layout.starts[owner]
    padded = q.new_zeros(sequences, layout.most, heads, width)
    padded[owner, row] = q
    # Query i of n stands at position length - n + i.
    fresh = layout.starts.diff()
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


class PagedDecoder:
    """A decoder of the Llama family and GPT-2 over paged keys and values, with the interface of `decoder.Decoder`.

    Args:
        weights: a loaded model in float32, whose matrices move to `device`.
        blocks: key/value blocks of the pool.
        size: tokens of a block.
        length: positions covered.
        device: where it runs.
        dtype: of matrices, results, keys and values.

    Raises:
        DataError: the model has experts.
    """

    def __init__(
        self, weights: Weights, blocks: int, size: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        c: DecoderConfig = weights.config
        if c.experts is not None:
            raise DataError("experts run on a CPU or by vLLM", place="engine.device", mend="use device: cpu")
        self.weights, self.config, self._size, self.device, self.dtype = weights, c, size, device, dtype
        self._tensors = _move(weights, device, dtype)
        self._cos, self._sin = torch.empty(0), torch.empty(0)
        if c.rope is not None:
            cos, sin = rotations(c.rope, c.head_dim, length)
            self._cos, self._sin = cos.to(device), sin.to(device)
        # One more block than the scheduler knows: graph padding writes there.
        shape = (c.layers, 2, (blocks + 1) * size, c.kv_heads, c.head_dim)
        self._pool = torch.zeros(shape, device=device, dtype=dtype)
        self._spare = blocks * size
        self._graphs: dict[tuple[int, int], Any] = {}

    def _reload(self) -> None:
        fresh = _move(self.weights, self.device, self.dtype)
        for name, tensor in fresh.items():
            self._tensors[name].copy_(tensor)  # in place: captured graphs hold the addresses

    @torch.inference_mode()
    def forward(self, batch: StepBatch) -> Tensor:
        """Normed results of the last layer for the wanted rows, float32 [wanted, hidden]."""
        layout = lay_out_blocks(batch.pieces, self._size).to(self.device)
        tokens = batch.tokens.to(self.device)
        positions = torch.from_numpy(batch.positions).to(self.device)
        if self.device.type == "cuda" and layout.most == 1 and len(tokens) <= GRAPH_SIZES[-1]:
            hidden = self._replay(tokens, positions, layout)
        else:
            hidden = self._run(tokens, positions, layout)
        if batch.wanted is not None:
            hidden = hidden[batch.wanted.to(self.device)]
        return hidden.float()

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, float32 [rows, vocabulary], on the CPU."""
        return F.linear(hidden.to(self.dtype), self._tensors["head"]).float().cpu()

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces tensors by name. Raises DataError for an unknown or misshapen one."""
        self.weights.update(tensors, place="update_weights")
        self._reload()

    def vectors(self, hidden: Tensor) -> Tensor:
        """What embeddings are made of."""
        return hidden.cpu()

    def _run(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        c, t = self.config, self._tensors
        x = F.embedding(tokens, t["embed"])
        if c.rope is None:
            x = x + t["positions"][positions]
        for i in range(c.layers):
            x = x + self._attention(i, self._norm(x, f"{i}.input_norm"), positions, layout)
            x = x + self._feed_forward(i, self._norm(x, f"{i}.mlp_norm"))
        return self._norm(x, "norm")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._tensors[name], self._tensors.get(name + ".bias")
        if bias is None:
            return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)
        return F.layer_norm(x, weight.shape, weight, bias, self.config.norm_epsilon)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self._tensors[name], self._tensors.get(name + ".bias"))

    def _attention(self, i: int, h: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        c = self.config
        qkv = self._linear(f"{i}.qkv", h).view(len(h), -1, c.head_dim)
        q, k, v = torch.split(qkv, [c.heads, c.kv_heads, c.kv_heads], dim=1)
        if c.qk_norm:
            q, k = self._norm(q, f"{i}.q_norm"), self._norm(k, f"{i}.k_norm")
        if c.rotated[i]:
            cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        keys, values = self._pool[i]
        keys.index_copy_(0, layout.mapping, k)
        values.index_copy_(0, layout.mapping, v)
        mixed = attend(q, keys, values, layout, self._size, c.windows[i])
        return self._linear(f"{i}.out", mixed.reshape(len(h), -1))

    def _feed_forward(self, i: int, h: Tensor) -> Tensor:
        up = self._linear(f"{i}.up", h)
        if self.config.family == "gpt2":
            return self._linear(f"{i}.down", F.gelu(up, approximate="tanh"))
        gate, up = up.chunk(2, dim=-1)
        return self._linear(f"{i}.down", F.silu(gate) * up)

    def _replay(self, tokens: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        """A decode step by a captured graph: padded to a known batch size and table width, inputs copied in place."""
        count = len(tokens)
        size = next(s for s in GRAPH_SIZES if s >= count)
        width = 1 << (layout.tables.shape[1] - 1).bit_length()
        if (size, width) not in self._graphs:
            self._graphs[size, width] = self._capture(size, width)
        graph, held, result = self._graphs[size, width]
        held_tokens, held_positions, held_layout = held
        held_tokens[:count], held_positions[:count] = tokens, positions
        held_layout.mapping.fill_(self._spare)
        held_layout.mapping[:count] = layout.mapping
        held_layout.tables.fill_(self._spare // self._size)
        held_layout.tables[:count, : layout.tables.shape[1]] = layout.tables
        held_layout.lengths.fill_(1)
        held_layout.lengths[:count] = layout.lengths
        graph.replay()
        found: Tensor = result[:count].clone()
        return found

    def _capture(self, size: int, width: int) -> tuple[Any, tuple[Tensor, Tensor, Layout], Tensor]:
        d, spare = self.device, self._spare
        tokens, positions = (torch.zeros(size, dtype=torch.int64, device=d) for _ in range(2))
        layout = Layout(
            mapping=torch.full((size,), spare, device=d),
            tables=torch.full((size, width), spare // self._size, dtype=torch.int32, device=d),
            starts=torch.arange(size + 1, dtype=torch.int32, device=d),
            lengths=torch.ones(size, dtype=torch.int32, device=d),
            longest=width * self._size,
            most=1,
        )
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries must have set themselves up before the capture
            self._run(tokens, positions, layout)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = self._run(tokens, positions, layout)
        return graph, (tokens, positions, layout), result


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _move(weights: Weights, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor by a short name, on the device."""
    found = {"embed": weights.embed, "head": weights.head.dense(), "norm": weights.norm.weight}
    if weights.norm.bias.numel():
        found |= {"norm.bias": weights.norm.bias, "positions": weights.positions}
    for i, layer in enumerate(weights.layers):
        assert isinstance(layer.mlp, Mlp)
        for name, norm in (
            ("input_norm", layer.input_norm), ("mlp_norm", layer.mlp_norm),
            ("q_norm", layer.q_norm), ("k_norm", layer.k_norm),
        ):  # fmt: skip
            found[f"{i}.{name}"] = norm.weight
            if norm.bias.numel():
                found[f"{i}.{name}.bias"] = norm.bias
        for name, linear in (
            ("qkv", layer.qkv), ("out", layer.out), ("up", layer.mlp.up), ("down", layer.mlp.down)
        ):  # fmt: skip
            found[f"{i}.{name}"] = linear.dense()
            if linear.bias is not None:
                found[f"{i}.{name}.bias"] = linear.bias
    return {name: tensor.to(device, dtype) for name, tensor in found.items()}
