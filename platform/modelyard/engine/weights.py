"""The decoder's tensors and where each checkpoint tensor goes, at load time and when weights are updated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from modelyard.engine.checkpoint import DecoderConfig
from modelyard.engine.linear import Linear
from modelyard.engine.options import Precision
from modelyard.errors import DataError


class Norm:
    """Weight and bias of a normalization; `bias` is empty where the family has none (RMS norm)."""

    def __init__(self, width: int, *, bias: bool = False) -> None:
        self.weight = torch.empty(width)
        self.bias = torch.empty(width if bias else 0)

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Both, for kernels on the CPU."""
        return self.weight.numpy(), self.bias.numpy()


@dataclass
class Mlp:
    """One feed-forward network. `up` holds gate and up stacked in gated families."""

    up: Linear
    down: Linear


@dataclass
class Mixture:
    """Experts, the router that chooses them, and perhaps one that every token uses, with its gate."""

    router: Tensor
    experts: list[Mlp]
    shared: Mlp | None
    shared_gate: Tensor | None


@dataclass
class Layer:
    """Tensors of one block. Query, key and value share a matrix, gate and up another."""

    input_norm: Norm
    mlp_norm: Norm
    qkv: Linear
    out: Linear
    mlp: Mlp | Mixture
    q_norm: Norm
    k_norm: Norm


@dataclass(frozen=True)
class Module:
    """A checkpoint's linear module: rows `start .. start+rows` of one of ours, known to adapters as `key`.

    `height`: rows of ours. `stacked`: above 0, this stands for the same module of so many experts, whose keys are
    `experts.0.` and so on before the second half of `key`.
    """

    key: tuple[int, str]
    height: int
    start: int
    rows: int
    columns: int
    stacked: int = 0


@dataclass(frozen=True)
class _Place:
    """Where a checkpoint tensor goes: its expected shape and how to store it."""

    shape: tuple[int, ...]
    store: Callable[[Tensor], None]


class Weights:
    """All tensors of a decoder, addressed by Hugging Face names.

    `modules` are those LoRA may adapt, by name; `packings` counts how often matrices moved to new places. `share` takes
    this slice's part of a matrix of an adapter, by the module's name and the matrix's (A or B), where the model is cut
    over devices; None = it is whole.

    Args:
        config: the decoder's shape.
        precision: what matrices are packed for on a CPU; None = nothing is packed, and tensors are made on PyTorch's
            default device in its default type.
    """

    def __init__(self, config: DecoderConfig, precision: Precision | None) -> None:
        c = self.config = config
        self.precision = precision
        self.packings = 0
        self.embed = torch.empty(c.vocabulary, c.hidden)
        self.positions = torch.empty(c.positions if c.rope is None else 0, c.hidden)
        self.norm = Norm(c.hidden, bias=c.family == "gpt2")
        self.layers = [self._layer(sparse) for sparse in c.sparse]
        self.head = Linear(c.vocabulary, c.hidden, bias=False)
        self.modules: dict[str, Module] = {}
        self.share: Callable[[str, str, Tensor], Tensor] | None = None
        self._places = dict(self._gpt2_index() if c.family == "gpt2" else self._llama_index())

    def _layer(self, sparse: bool) -> Layer:
        c = self.config
        qkv_rows = (c.heads + 2 * c.kv_heads) * c.head_dim
        bias = c.family == "gpt2"
        return Layer(
            input_norm=Norm(c.hidden, bias=bias),
            mlp_norm=Norm(c.hidden, bias=bias),
            qkv=Linear(qkv_rows, c.hidden, c.qkv_bias),
            out=Linear(c.hidden, c.heads * c.head_dim, c.out_bias),
            mlp=self._mixture() if sparse else self._mlp(c.intermediate, c.mlp_bias),
            q_norm=Norm(c.head_dim if c.qk_norm else 0),
            k_norm=Norm(c.head_dim if c.qk_norm else 0),
        )

    def _mlp(self, width: int, bias: bool = False) -> Mlp:
        c = self.config
        stacked = 1 if c.family == "gpt2" else 2
        return Mlp(Linear(stacked * width, c.hidden, bias), Linear(c.hidden, width, bias))

    def _mixture(self) -> Mixture:
        c, e = self.config, self.config.experts
        assert e is not None
        return Mixture(
            router=torch.empty(e.count, c.hidden),
            experts=[self._mlp(e.width) for _ in range(e.count)],
            shared=self._mlp(e.shared) if e.shared else None,
            shared_gate=torch.empty(1, c.hidden) if e.shared else None,
        )

    def _ends(self, embed: str) -> Iterator[tuple[str, _Place]]:
        """Both ends of the model: embedding and head, which a tied checkpoint stores once."""
        c = self.config

        def store(value: Tensor) -> None:
            self.embed.copy_(value)
            if c.tied:
                self.head.set_rows(0, value, bias=False)

        yield embed, _Place((c.vocabulary, c.hidden), store)
        if not c.tied:
            yield from self._rows("lm_head", self.head, 0, c.vocabulary, None)

    def _llama_index(self) -> Iterator[tuple[str, _Place]]:
        yield from self._ends("model.embed_tokens.weight")
        yield from _norm("model.norm", self.norm)
        for i, layer in enumerate(self.layers):
            yield from self._llama_layer(i, f"model.layers.{i}.", layer)

    def _llama_layer(self, i: int, prefix: str, layer: Layer) -> Iterator[tuple[str, _Place]]:
        c = self.config
        q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
        attention = prefix + "self_attn."
        yield from _norm(prefix + "input_layernorm", layer.input_norm)
        yield from _norm(prefix + "post_attention_layernorm", layer.mlp_norm)
        yield from self._rows(attention + "q_proj", layer.qkv, 0, q, (i, "qkv"))
        yield from self._rows(attention + "k_proj", layer.qkv, q, kv, (i, "qkv"))
        yield from self._rows(attention + "v_proj", layer.qkv, q + kv, kv, (i, "qkv"))
        yield from self._rows(attention + "o_proj", layer.out, 0, c.hidden, (i, "out"))
        if c.qk_norm:
            yield from _norm(attention + "q_norm", layer.q_norm)
            yield from _norm(attention + "k_norm", layer.k_norm)
        if isinstance(layer.mlp, Mlp):
            yield from self._gated(prefix + "mlp.", layer.mlp, (i, "up"), (i, "down"))
        elif c.family == "mixtral":
            yield from self._mixture_index(i, prefix + "block_sparse_moe.", layer.mlp, ("w1", "w3", "w2"))
        else:
            yield from self._mixture_index(i, prefix + "mlp.", layer.mlp, ("gate_proj", "up_proj", "down_proj"))

    def _mixture_index(
        self, i: int, prefix: str, mixture: Mixture, names: tuple[str, str, str]
    ) -> Iterator[tuple[str, _Place]]:
        count, hidden = mixture.router.shape
        yield prefix + "gate.weight", _tensor(mixture.router)
        self.modules[prefix + "gate"] = Module((i, "router"), count, 0, count, hidden)
        for index, expert in enumerate(mixture.experts):
            key = f"experts.{index}."
            yield from self._gated(prefix + key, expert, (i, key + "up"), (i, key + "down"), names)
        up, down = mixture.experts[0].up, mixture.experts[0].down
        # transformers holds the experts of a layer as one parameter, and so do adapters trained with it.
        self.modules[prefix + "experts.gate_up_proj"] = Module((i, "up"), up.rows, 0, up.rows, up.columns, count)
        self.modules[prefix + "experts.down_proj"] = Module((i, "down"), down.rows, 0, down.rows, down.columns, count)
        if mixture.shared is not None and mixture.shared_gate is not None:
            yield from self._gated(prefix + "shared_expert.", mixture.shared, (i, "shared.up"), (i, "shared.down"))
            yield prefix + "shared_expert_gate.weight", _tensor(mixture.shared_gate)
            self.modules[prefix + "shared_expert_gate"] = Module((i, "shared_gate"), 1, 0, 1, hidden)

    def _gated(
        self,
        prefix: str,
        mlp: Mlp,
        up_key: tuple[int, str],
        down_key: tuple[int, str],
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> Iterator[tuple[str, _Place]]:
        width = mlp.down.columns
        yield from self._rows(prefix + names[0], mlp.up, 0, width, up_key)
        yield from self._rows(prefix + names[1], mlp.up, width, width, up_key)
        yield from self._rows(prefix + names[2], mlp.down, 0, mlp.down.rows, down_key)

    def _gpt2_index(self) -> Iterator[tuple[str, _Place]]:
        yield from self._ends("transformer.wte.weight")
        yield "transformer.wpe.weight", _tensor(self.positions)
        yield from _norm("transformer.ln_f", self.norm)
        for i, layer in enumerate(self.layers):
            prefix = f"transformer.h.{i}."
            assert isinstance(layer.mlp, Mlp)
            yield from _norm(prefix + "ln_1", layer.input_norm)
            yield from _norm(prefix + "ln_2", layer.mlp_norm)
            for name, linear, key in (
                ("attn.c_attn", layer.qkv, "qkv"),
                ("attn.c_proj", layer.out, "out"),
                ("mlp.c_fc", layer.mlp.up, "up"),
                ("mlp.c_proj", layer.mlp.down, "down"),
            ):
                yield from self._rows(prefix + name, linear, 0, linear.rows, (i, key), transposed=True)

    def _rows(
        self, name: str, linear: Linear, start: int, rows: int, key: tuple[int, str] | None, *, transposed: bool = False
    ) -> Iterator[tuple[str, _Place]]:
        """A linear module that fills rows of `linear`; GPT-2 stores its matrices transposed."""
        if key is not None:
            self.modules[name] = Module(key, linear.rows, start, rows, linear.columns)
        shape = (linear.columns, rows) if transposed else (rows, linear.columns)
        yield (
            f"{name}.weight",
            _Place(shape, lambda v: linear.set_rows(start, v.T if transposed else v, bias=False)),
        )
        if linear.bias is not None:
            yield f"{name}.bias", _Place((rows,), lambda v: linear.set_rows(start, v, bias=True))

    def load(self, tensors: Iterable[tuple[str, Tensor]], place: str) -> None:
        """Fills every tensor. Raises DataError for a missing, unknown or misshapen one."""
        missing = set(self._places) - self.update(tensors, place)
        if missing:
            raise DataError(
                f"{len(missing)} tensors are missing, first {min(missing)}", place=place, mend="restore the checkpoint"
            )

    @torch.no_grad()
    def update(self, tensors: Iterable[tuple[str, Tensor]], place: str) -> set[str]:
        """Replaces the named tensors and returns their names. Raises DataError for an unknown or misshapen one."""
        done: set[str] = set()
        try:
            for name, value in tensors:
                target = self._target(name, value, place)
                if target is not None:
                    target.store(value.detach().to(self.embed.device))
                    done.add(name)
        finally:
            if self.precision is not None:
                self.pack(self.precision)
        return done

    def _target(self, name: str, value: Tensor, place: str) -> _Place | None:
        target = self._places.get(name) or self._places.get(f"transformer.{name}")  # the first GPT-2 files
        if target is None:
            if self._ignorable(name):
                return None
            raise DataError(f"tensor {name} has no place in this model", place=place, mend="check config.json")
        if tuple(value.shape) != target.shape:
            raise DataError(
                f"tensor {name} has shape {tuple(value.shape)}, the config says {target.shape}",
                place=place,
                mend="check config.json",
            )
        return target

    def tensors(self) -> Iterator[Tensor]:
        """The matrices and embeddings, as float32."""
        yield from (self.embed, self.positions)
        for linear in self._linears():
            yield linear.dense()

    def pack(self, precision: Precision) -> None:
        """Brings all matrices into the form `precision` computes with. All cores share it, without Python's lock."""
        self.precision = precision
        # The largest, the head, first: last it would keep one core busy alone.
        largest_first = sorted(self._linears(), key=lambda linear: -linear.rows * linear.columns)
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(lambda linear: linear.pack(precision), largest_first))
        self.packings += 1

    def _ignorable(self, name: str) -> bool:
        # Old checkpoints store RoPE tables and causal masks, and some a copy of the tied head.
        buffers = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
        return name.endswith(buffers) or (self.config.tied and name == "lm_head.weight")

    def _linears(self) -> Iterable[Linear]:
        for layer in self.layers:
            yield from (layer.qkv, layer.out)
            mlps = [layer.mlp] if isinstance(layer.mlp, Mlp) else [*layer.mlp.experts, layer.mlp.shared]
            for mlp in mlps:
                if mlp is not None:
                    yield from (mlp.up, mlp.down)
        yield self.head


def dense_weights(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Weights:
    """Empty weights in plain tensors on a device, in the type it computes in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return Weights(config, None)
    finally:
        torch.set_default_dtype(before)


def _tensor(target: Tensor) -> _Place:
    return _Place(tuple(target.shape), lambda value: (target.copy_(value), None)[1])


def _norm(name: str, norm: Norm) -> Iterator[tuple[str, _Place]]:
    yield f"{name}.weight", _tensor(norm.weight)
    if norm.bias.numel():
        yield f"{name}.bias", _tensor(norm.bias)
