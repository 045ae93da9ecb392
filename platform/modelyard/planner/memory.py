"""Peak memory of one worker in training and serving, by component.

The peak is the largest of three moments: the start of backward (all activations, no new gradients),
its end (all gradients, one layer's activations) and the optimizer step (its temporary buffers).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.planner import activations as act
from modelyard.planner.architecture import Architecture, Layer, parse
from modelyard.planner.layout import Layout
from modelyard.planner.parameters import count
from modelyard.planner.precision import DTYPE_BYTES, Precision, optimizer_bytes, precision


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


def training_memory(
    config: Mapping[str, Any] | Architecture, *, sequence_length: int, layout: Layout | None = None,
    optimizer: str = "adamw", precision_name: str | Precision = "fp32", attention: act.Attention = "flash",
    micro_batches: int = 1, trainable: int | None = None, fused_optimizer: bool = True, logit_copies: float = 4.0,
    overhead: float = 0.0,
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
        logit_copies: tensors of the logits' size at the loss.
        overhead: bytes a worker holds before any of this (process, CUDA context, communication buffers).

    Raises:
        RecipeError: bad config, unknown optimizer or precision.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    layout, p = layout or Layout(), precision(precision_name)
    moments = [
        _stage_memory(a, stage, layout, p, optimizer, sequence_length, attention, micro_batches,
                      trainable, fused_optimizer, logit_copies, overhead)
        for stage in _stages(a, layout, micro_batches)
    ]  # fmt: skip
    return max(moments, key=lambda m: m.peak)


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
        return [_Stage(p.total - experts, experts, layers, 1.0, True)]
    first = (body - experts) * share + p.embedding + p.positions
    last = (body - experts) * share + p.other + (p.head or p.embedding)
    held = [in_flight(layout, stage, micro_batches) for stage in (0, layout.pipeline - 1)]
    return [
        _Stage(first, experts * share, layers, held[0], False),
        _Stage(last, experts * share, layers, held[1], True),
    ]


def _stage_memory(
    a: Architecture, stage: _Stage, layout: Layout, p: Precision, optimizer: str, sequence_length: int,
    attention: act.Attention, micro_batches: int, trainable: int | None, fused: bool, copies: float, overhead: float,
) -> TrainingMemory:  # fmt: skip
    held = (stage.parameters + stage.experts / layout.expert) / layout.tensor
    trained = held if trainable is None else min(trainable / layout.tensor / layout.pipeline, held)
    shards = [layout.shard if layout.zero >= level else 1 for level in (1, 2, 3)]
    states = _state_bytes(a, p, optimizer)
    parameters = held * p.weights / shards[2]
    gradients = trained * p.gradients / shards[1]
    optimizing = trained * states / shards[0]
    host = layout.offload and layout.zero == 3
    kept, working = _activation_bytes(stage, layout, p, sequence_length, attention)
    logits = 0.0
    if stage.has_head:
        tokens = layout.micro_batch * sequence_length
        logits = act.head_bytes(a, tokens, act.Cut(layout.tensor, layout.sequence_parallel, layout.context), copies)
    gathered = _gathered(a, stage, layout, p)
    step = trained * p.weights / shards[0] * (0 if fused else 1)
    if host:
        parameters = optimizing = step = 0.0
    early = gradients if micro_batches > 1 else 0.0
    moments = {
        "loss": (early, kept, logits, gathered),
        "backward": (gradients, working, 0.0, gathered),
        "optimizer": (gradients, 0.0, 0.0, step),
    }
    peaks = {name: parameters + optimizing + sum(parts) + overhead for name, parts in moments.items()}
    moment = max(peaks, key=lambda name: peaks[name])
    now = moments[moment]
    return TrainingMemory(
        parameters=parameters, gradients=now[0], optimizer=optimizing, activations=now[1], logits=now[2],
        temporary=now[3], overhead=overhead, peak=peaks[moment], moment=moment,
    )  # fmt: skip


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
    extra = working if layout.recompute == "full" and not stage.has_head else 0.0
    return kept + extra, working


def _gathered(a: Architecture, stage: _Stage, layout: Layout, p: Precision) -> float:
    """Bytes of unsharded weights and gradients alive at once under FSDP: two layers, and the root group."""
    if layout.zero < 3 or layout.shard == 1:
        return 0.0
    layer = max(((x.parameters - x.ffn) + x.ffn / layout.expert for x, _ in stage.layers), default=0.0)
    root = (a.embedding + a.head + a.positions) if layout.pipeline == 1 else max(a.embedding, a.head)
    return (2 * layer + root) / layout.tensor * p.compute + layer / layout.tensor * p.gradients


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
    return sum(
        x.count * x.kv_values * width / (min(tensor, x.kv_heads) if not x.latent else 1) for x in a.layers
    )


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
