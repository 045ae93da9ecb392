"""Peak memory of one worker in training and serving, by component.

The peak is the largest of three moments: the start of backward (all activations, no new gradients),
its end (all gradients, one layer's activations) and the optimizer step (its temporary buffers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelyard.planner import activations as act
from modelyard.planner.architecture import Architecture, Layer, parse
from modelyard.planner.layout import Layout
from modelyard.planner.parameters import count
from modelyard.planner.precision import DTYPE_BYTES, Precision, optimizer_bytes, precision

_MAKING = 6.0
"""Bytes a value while a matrix is dequantized: fp32, and the codes as indices or a copy in the type of the product."""


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of one worker. `peak` is the largest moment, so it can be less than the sum of the parts."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    temporary: float
    overhead: float
    peak: float
    moment: str

    def rows(self) -> list[tuple[str, float]]:
        """Components as (name, bytes) at the peak's moment, zero ones left out."""
        names = ("parameters", "gradients", "optimizer", "activations", "logits", "temporary", "overhead")
        return [(name, float(getattr(self, name))) for name in names if getattr(self, name) > 0]


@dataclass(frozen=True)
class _Stage:
    """The heaviest pipeline stage: its parameters, layers and micro-batches in flight."""

    parameters: float
    experts: float
    layers: tuple[tuple[Layer, float], ...]
    in_flight: float
    has_head: bool
    has_embedding: bool = False


def training_memory(
    config: Mapping[str, Any] | Architecture, *, sequence_length: int, layout: Layout | None = None,
    optimizer: str = "adamw", precision_name: str | Precision = "fp32", attention: act.Attention = "flash",
    micro_batches: int = 1, trainable: int | None = None, fused_optimizer: bool = True, loss_chunk: float | None = None,
    overhead: float = 0.0, frozen_bits: float | None = None,
) -> TrainingMemory:  # fmt: skip
    """Peak memory of the heaviest worker.

    Args:
        config: Hugging Face config or its `Architecture`.
        sequence_length: tokens a sequence.
        layout: degrees of parallelism, micro-batch and recomputation; None = one worker, micro-batch 1.
        optimizer: `adamw`, `adamw8bit`, `muon`, `lion`, `momentum`, `sgd`, `adafactor`.
        precision_name: `fp32`, `mixed` (FSDP2), `master` (Megatron-LM) or `bf16`.
        attention: `flash` or `eager`.
        micro_batches: micro-batches an optimizer step and worker; above 1 gradients exist at every backward.
        trainable: parameters that are trained (adapters); None = all.
        fused_optimizer: whether the step updates in place; else a temporary of the parameters' size is used.
        loss_chunk: bytes of fp32 logits made at once where the output layer is fused with the loss; None =
            all logits, three times over.
        overhead: bytes a worker holds before any of this (process, CUDA context, communication buffers).
        frozen_bits: bits a parameter of the blocks' matrices where adapters leave them quantized; None = as they are.

    Raises:
        RecipeError: bad config, unknown optimizer or precision.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    layout, p = layout or Layout(), precision(precision_name)
    moments = [
        _stage_memory(a, stage, layout, p, optimizer, sequence_length, attention, micro_batches,
                      trainable, fused_optimizer, loss_chunk, overhead)
        for stage in _stages(a, layout, micro_batches)
    ]  # fmt: skip
    largest = max(moments, key=lambda m: m.peak)
    return largest if frozen_bits is None else _quantized(largest, a, layout, p, frozen_bits)


def _quantized(m: TrainingMemory, a: Architecture, layout: Layout, p: Precision, bits: float) -> TrainingMemory:
    """With the matrices in `bits` each, and beside them the one that is made whole for its product.

    Experts are one tensor of all of them and stay as they are.
    """
    matrices = sum(x.count * (x.attention + x.cross + (x.ffn if x.experts <= 1 else 0)) for x in a.stack())
    share = layout.tensor * layout.pipeline * (layout.shard if layout.zero >= 3 else 1)
    saved = matrices / share * (p.weights - bits / 8)
    largest = max((x.hidden * max(x.ffn_width, x.heads * x.head_dim) for x in a.stack()), default=0)
    made = largest * _MAKING
    return replace(m, parameters=m.parameters - saved, temporary=m.temporary + made, peak=m.peak - saved + made)


def in_flight(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches' worth of a whole stage's activations that `stage` holds at once.

    GPipe holds all; 1F1B and ZB-H1 as many as stages follow, itself included; interleaving adds the
    warm-up of its further chunks (Narayanan et al., arXiv 2104.04473); the V-shaped schedules (ZBV,
    DualPipeV) hold about as many on every stage as 1F1B on its first.
    """
    p, v, m = layout.pipeline, layout.virtual, micro_batches
    if p == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(m)
    if layout.schedule == "interleaved":
        chunks = min((p - stage - 1) * 2 + (v - 1) * p + 1, m * v)
        return chunks / v
    if layout.schedule in ("zbv", "dualpipev"):
        return float(min(m, p + (layout.schedule == "dualpipev")))
    return float(min(m, p - stage))


def _stages(a: Architecture, layout: Layout, micro_batches: int) -> list[_Stage]:
    """The first and last pipeline stage (the heaviest are among them); one stage without a pipeline."""
    p = count(a)
    share = 1 / layout.pipeline
    layers = tuple((layer, layer.count * share) for layer in a.stack())
    experts = sum(x.count * (x.ffn - x.matrices * x.hidden * x.shared_width) for x in a.stack() if x.experts > 1)
    body = p.total - p.embedding - p.positions - p.head - p.other
    if layout.pipeline == 1:
        return [_Stage(p.total - experts, experts, layers, 1.0, True, True)]
    first = (body - experts) * share + p.embedding + p.positions
    last = (body - experts) * share + p.other + (p.head or p.embedding)
    held = [in_flight(layout, stage, micro_batches) for stage in (0, layout.pipeline - 1)]
    return [
        _Stage(first, experts * share, layers, held[0], False, True),
        _Stage(last, experts * share, layers, held[1], True),
    ]


def _stage_memory(
    a: Architecture, stage: _Stage, layout: Layout, p: Precision, optimizer: str, sequence_length: int,
    attention: act.Attention, micro_batches: int, trainable: int | None, fused: bool, chunk: float | None,
    overhead: float,
) -> TrainingMemory:  # fmt: skip
    held = (stage.parameters + stage.experts / layout.expert) / layout.tensor
    trained = held if trainable is None else min(trainable / layout.tensor / layout.pipeline, held)
    states = _State(a, stage, layout, p, held, trained / held)
    optimizer_share = states.share(layout.shard if layout.zero >= 1 else 1)
    moments = _moments(a, stage, layout, p, states, sequence_length, attention, micro_batches, chunk)
    optimizing = trained * _state_bytes(a, p, optimizer) * optimizer_share
    step = trained * p.weights * optimizer_share * (0 if fused else 1)
    moments["optimizer"] = (states.gradients, 0.0, 0.0, step)
    parameters = states.parameters
    if layout.offload and layout.zero == 3:
        parameters = optimizing = 0.0
        moments["optimizer"] = (0.0, 0.0, 0.0, 0.0)
    peaks = {name: parameters + optimizing + sum(parts) + overhead for name, parts in moments.items()}
    moment = max(peaks, key=lambda name: peaks[name])
    now = moments[moment]
    return TrainingMemory(
        parameters=parameters, gradients=now[0], optimizer=optimizing, activations=now[1], logits=now[2],
        temporary=now[3], overhead=overhead, peak=peaks[moment], moment=moment,
    )  # fmt: skip


class _State:
    """Bytes of weights and gradients of one stage, sharded and gathered."""

    def __init__(
        self, a: Architecture, stage: _Stage, layout: Layout, p: Precision, held: float, trained: float
    ) -> None:
        self.dense = stage.parameters / layout.tensor / held
        self.expert = layout.expert
        self.sharded = layout.zero >= 2 and layout.shard > 1
        self.parameters = held * p.weights * self.share(layout.shard if layout.zero >= 3 else 1)
        if layout.zero == 2 and self.sharded and not p.master:
            # FSDP2 without resharding: the shard, and the gathered weights until backward is through.
            self.parameters = held * (p.weights / layout.shard + p.compute)
        self.gradients = held * trained * p.gradients * self.share(layout.shard if layout.zero >= 2 else 1)
        unsharded = p.compute if self.sharded else p.gradients
        self.embedding = (a.embedding + a.positions) / layout.tensor * (stage.has_embedding)
        self.head = (a.head or a.embedding) / layout.tensor * stage.has_head
        self.tied = a.tied and stage.has_head and layout.pipeline == 1
        self.root_gradients = trained * unsharded * (self.head + (0 if self.tied else self.embedding))
        self.head_gradient = trained * unsharded * self.head
        self.head_fp32 = trained * 4.0 * self.head
        self.embedding_gradient = trained * unsharded * self.embedding
        layer = max(((x.parameters - x.ffn) + x.ffn / layout.expert for x, _ in stage.layers), default=0.0)
        self.layer = layer / layout.tensor
        gathering = layout.zero == 3 and layout.shard > 1
        root = self.head + (0 if self.tied else self.embedding)
        self.root_weights = root * p.compute if gathering else 0.0
        # The layer at work, the next one arriving, and the buffer it arrives in.
        self.arriving = 3 * self.layer * p.compute if gathering else 0.0
        # A reduce-scatter's input and, until it is through, the one before.
        self.leaving = 2 * self.layer * p.compute * trained if self.sharded else 0.0
        self.whole = held * trained * p.compute
        share = (self.head + (0 if self.tied else self.embedding)) / held
        self.layer_gradients = self.gradients * max(1 - share, 0.0)

    def share(self, shards: int) -> float:
        """What sharding over `shards` workers leaves: experts are already spread over some of those workers."""
        return self.dense / shards + (1 - self.dense) / max(shards / self.expert, 1.0)


def _moments(
    a: Architecture, stage: _Stage, layout: Layout, p: Precision, s: _State, sequence_length: int,
    attention: act.Attention, micro_batches: int, chunk: float | None,
) -> dict[str, tuple[float, float, float, float]]:  # fmt: skip
    """(gradients, activations, logits, temporary) at each moment that can be the peak."""
    cut = act.Cut(layout.tensor, layout.sequence_parallel, layout.context)
    tokens = layout.micro_batch * sequence_length
    kept, working = _activation_bytes(stage, layout, p, sequence_length, attention)
    logits = act.head_bytes(a, tokens, cut, 1.0) if stage.has_head else 0.0
    if stage.has_head:
        kept += act.norm_bytes(a.hidden, tokens, p.compute, cut, a.layer_norm)
    again = working if layout.recompute == "full" else 0.0
    flow = act.input_bytes(stage.layers[0][0], tokens, p.compute, cut)
    early = 0.0
    if micro_batches > 1:
        early = s.gradients if layout.sync_each or not s.sharded else s.whole
    # Gradients of this backward come beside those of earlier micro-batches only until they are added.
    layers = max(early, s.layer_gradients)
    tied = 2 * s.embedding_gradient if s.tied else 0.0
    loss = (early, kept, 3 * logits, s.root_weights)
    head = (early + s.head_gradient * (early == 0 or s.sharded), kept, logits, s.root_weights)
    if chunk is not None and stage.has_head:
        # The forward pass makes the gradients: the layer's in fp32, and the hidden states' beside a copy of these.
        made = early + s.head_fp32
        loss = (made, kept + 2 * flow, 2 * min(logits, chunk), s.root_weights)
        head = (made, kept + flow, 0.0, s.root_weights)
    return {
        "loss": loss,
        "head": head,
        "backward": (
            early + s.head_gradient * (early == 0 or s.sharded), kept + again + flow, 0.0,
            s.root_weights + s.arriving + s.leaving,
        ),
        "first layer": (
            layers + s.head_gradient, working, 0.0, s.root_weights + s.arriving + s.leaving,
        ),
        "embedding": (layers + s.root_gradients, flow, 0.0, s.root_weights + s.leaving + tied),
    }  # fmt: skip


def _state_bytes(a: Architecture, p: Precision, optimizer: str) -> float:
    """Bytes a parameter of optimizer state, the fp32 master copy included."""
    body = sum(x.count * (x.attention + x.cross + x.ffn + x.router) for x in a.stack())
    width = p.master or p.weights
    return p.master + optimizer_bytes(optimizer, width, matrix_share=body / count(a).total, width=a.hidden)


def _activation_bytes(
    stage: _Stage, layout: Layout, p: Precision, sequence_length: int, attention: act.Attention
) -> tuple[float, float]:
    """Bytes of activations at the start of backward, and those of the one layer that is being worked on."""
    cut = act.Cut(layout.tensor, layout.sequence_parallel, layout.context)
    tokens = layout.micro_batch * sequence_length
    kept = working = 0.0
    for layer, amount in stage.layers:
        one = act.layer_bytes(layer, tokens, sequence_length, p.compute, cut, attention)
        held = act.kept_bytes(layer, tokens, sequence_length, p.compute, cut, attention, layout.recompute)
        kept += amount * held * stage.in_flight
        working = max(working, one)
    return kept, working


@dataclass(frozen=True)
class ServingMemory:
    """Bytes of one serving worker: weights, KV cache, working buffers."""

    weights: float
    kv_cache: float
    activations: float
    overhead: float

    @property
    def peak(self) -> float:
        """All together."""
        return self.weights + self.kv_cache + self.activations + self.overhead

    def rows(self) -> list[tuple[str, float]]:
        """Components as (name, bytes), zero ones left out."""
        names = ("weights", "kv_cache", "activations", "overhead")
        return [(name, float(getattr(self, name))) for name in names if getattr(self, name) > 0]


def kv_bytes_per_token(config: Mapping[str, Any] | Architecture, dtype: str = "bf16", tensor: int = 1) -> float:
    """Bytes the KV cache takes for one token on one of `tensor` devices (windows not discounted)."""
    a = config if isinstance(config, Architecture) else parse(config)
    width = DTYPE_BYTES[dtype]
    # A device holds at least one key-value head: fewer heads than devices are replicated.
    return sum(x.count * x.kv_values * width / (min(tensor, x.kv_heads) if not x.latent else 1) for x in a.layers)


def serving_memory(
    config: Mapping[str, Any] | Architecture, *, sequences: int, sequence_length: int, dtype: str = "bf16",
    kv_dtype: str | None = None, tensor: int = 1, batch_tokens: int = 2048, overhead: float = 0.0,
) -> ServingMemory:  # fmt: skip
    """Memory of one of `tensor` devices that serve a model.

    Args:
        config: Hugging Face config or its `Architecture`.
        sequences: requests held at once, each of up to `sequence_length` tokens.
        sequence_length: prompt and answer, tokens.
        dtype: of the weights: `fp32`, `bf16`, `fp8`, `int8`, `int4`.
        kv_dtype: of the KV cache; None = the weights' if it has two bytes or more, else `bf16`.
        tensor: tensor-parallel devices.
        batch_tokens: tokens of one engine step (prefill chunks and decodes together).
        overhead: bytes a worker holds before any of this.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    cache = kv_dtype or (dtype if DTYPE_BYTES[dtype] >= 2 else "bf16")
    width = max(DTYPE_BYTES[dtype], 2.0)
    kv = 0.0
    for x in a.layers:
        length = min(sequence_length, x.window) if x.window else sequence_length
        kv += sequences * length * x.count * x.kv_values * DTYPE_BYTES[cache] / (
            min(tensor, x.kv_heads) if not x.latent else 1
        )  # fmt: skip
    widest = max((x.active_width * x.matrices + 4 * x.hidden for x in a.stack()), default=0)
    working = batch_tokens * widest * width / tensor + sequences * a.vocab * 4.0
    return ServingMemory(
        weights=count(a).total * DTYPE_BYTES[dtype] / tensor, kv_cache=kv, activations=working, overhead=overhead
    )
