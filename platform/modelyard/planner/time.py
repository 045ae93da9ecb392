"""Step time by a roofline with one efficiency factor a device, plus communication that is not hidden.

    step = (matrix products + elementwise traffic) x (1 + bubble) + exposed communication + optimizer
    matrix products = hardware FLOPs / (peak x efficiency x saturation)
    elementwise traffic = bytes of activations x passes / bandwidth

`efficiency` is what large matrix products reach of the peak on this device; `saturation` is what is left
of it when tensor parallelism or a small model makes them narrow. `calibrate` measures the efficiency
and the bandwidth of a cluster from its own runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.errors import RecipeError
from modelyard.planner import activations as act
from modelyard.planner.architecture import Architecture, parse
from modelyard.planner.flops import Flops, flops_per_token
from modelyard.planner.hardware import Hardware
from modelyard.planner.layout import Layout
from modelyard.planner.parameters import count
from modelyard.planner.precision import Precision, precision

OVERLAP = {"data": 0.8, "pipeline": 0.5, "tensor": 0.6, "context": 0.7, "expert": 0.2}
"""Share of each kind of communication that hides behind compute where the device can do both at once."""
_OPTIMIZER_PASSES = 7
"""AdamW reads weight, gradient and two states and writes weight and two states: seven passes of memory."""
_PASSES = {"cpu": 4.0, "gpu": 2.0, "tpu": 2.0}
"""How often the activations kept for backward cross memory in a step: written and read forward, read and
written backward; half of that where kernels are fused."""
_NARROW = {"cpu": 16.0, "gpu": 160.0, "tpu": 160.0}
"""Width of a matrix product at which half of the efficiency is lost."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; `mfu` is model FLOPs over peak x seconds."""

    compute: float
    bubble: float
    communication: float
    optimizer: float
    flops: float
    mfu: float

    @property
    def seconds(self) -> float:
        """The step."""
        return self.compute + self.bubble + self.communication + self.optimizer

    @property
    def bubble_share(self) -> float:
        """Share of the step that pipeline stages wait, 0..1."""
        return self.bubble / self.seconds

    @property
    def communication_share(self) -> float:
        """Share of the step spent in communication that nothing hides, 0..1."""
        return self.communication / self.seconds


def bubble(layout: Layout, micro_batches: int) -> float:
    """Idle time of a pipeline over its busy time.

    GPipe and 1F1B idle (p - 1) / m, interleaving divides it by its chunks, ZB-H1 keeps about a third
    (Qi et al., arXiv 2401.10241), the V-shaped schedules leave next to nothing.
    """
    p, m = layout.pipeline, max(micro_batches, 1)
    base = (p - 1) / m
    return base * {
        "gpipe": 1.0, "1f1b": 1.0, "interleaved": 1.0 / layout.virtual, "zero-bubble": 1 / 3,
        "zbv": 0.02, "dualpipev": 0.1,
    }[layout.schedule]  # fmt: skip


def communication(
    a: Architecture, layout: Layout, hw: Hardware, p: Precision, sequence_length: int, micro_batches: int
) -> dict[str, float]:
    """Seconds of communication an optimizer step and device, by kind, before any of it is hidden.

    Rings move 2 (n - 1) / n of the bytes for an all-reduce and half of it for a gather or scatter.
    Tensor parallelism: four all-reduces (or their halves under sequence parallelism) a layer and
    micro-batch. Devices are placed tensor first, then context and expert, then data, then pipeline.
    """
    tokens = layout.micro_batch * sequence_length / layout.context
    held = count(a).total / (layout.tensor * layout.pipeline)
    layers = a.depth / layout.pipeline
    outer = tokens * a.hidden * p.compute
    inside = layout.tensor * layout.context
    out: dict[str, float] = {}
    if layout.tensor > 1:
        moved = 4 * 2 * _ring(layout.tensor) * outer * layers * micro_batches
        out["tensor"] = moved / _link(hw, layout.tensor)
    if layout.context > 1:
        kv = max(x.kv_values for x in a.layers) / min(layout.tensor, max(x.kv_heads for x in a.layers))
        out["context"] = 3 * (layout.context - 1) * tokens * kv * p.compute * layers * micro_batches / _link(hw, inside)
    if layout.expert > 1:
        chosen = max(x.experts_active for x in a.stack())
        moved = 4 * _ring(layout.expert) * outer / layout.tensor * chosen * layers * micro_batches
        out["expert"] = moved / _link(hw, inside * layout.expert)
    if layout.data > 1:
        out["data"] = _data_seconds(layout, hw, p, held, inside, micro_batches)
    if layout.pipeline > 1:
        moved = 2 * outer / layout.tensor * layout.virtual * micro_batches
        out["pipeline"] = moved / (hw.inter if layout.devices > hw.node else hw.intra)
    return out


def _ring(n: int) -> float:
    return (n - 1) / n


def _link(hw: Hardware, span: int) -> float:
    """Bytes a second of a collective over `span` neighbouring devices: the slowest link on its way."""
    return hw.intra if span <= hw.node else hw.inter


def _data_seconds(layout: Layout, hw: Hardware, p: Precision, held: float, inside: int, micro_batches: int) -> float:
    """Gradients are reduced once a step; under ZeRO-3 weights are gathered for each forward and backward too."""
    link = _link(hw, inside * (layout.shard if layout.zero else layout.data))
    n = layout.shard if layout.zero else layout.data
    if layout.zero == 3:
        reductions = micro_batches if layout.sync_each else 1
        moved = _ring(n) * held * (2 * p.compute * micro_batches + p.gradients * reductions)
    else:
        moved = 2 * _ring(n) * held * p.gradients
    replicas = layout.data // n
    across = 2 * _ring(replicas) * held * p.gradients / n / hw.inter
    return moved / link + across


def saturation(a: Architecture, layout: Layout, kind: str) -> float:
    """Share of the efficiency that products as narrow as this layout's keep, 0..1, weighted by their FLOPs."""
    half = _NARROW[kind]
    total = kept = 0.0
    for layer in a.stack():
        inner = max(layer.ffn_width / layout.tensor, 1.0)
        heads = max(layer.heads * layer.head_dim / layout.tensor, 1.0)
        parts = ((layer.ffn_active, min(inner, layer.hidden)), (layer.attention, min(heads, layer.hidden)))
        for weights, width in parts:
            total += layer.count * weights
            kept += layer.count * weights * width / (width + half)
    return kept / total


def traffic(a: Architecture, layout: Layout, sequence_length: int, width: int) -> float:
    """Bytes of activations one token of a micro-batch moves once, on one device of a whole pipeline."""
    cut = act.Cut(layout.tensor, layout.sequence_parallel, layout.context)
    tokens = layout.micro_batch * sequence_length
    layers = sum(x.count * act.layer_bytes(x, tokens, sequence_length, width, cut, "flash") for x in a.stack())
    # Recomputing writes the activations once more, but into memory still in cache, a layer at a time.
    again = {"none": 1.0, "selective": 1.1, "full": 1.2}[layout.recompute]
    return (layers * again / layout.pipeline + act.head_bytes(a, tokens, cut, 3.0) / layout.pipeline) / tokens


@dataclass(frozen=True)
class Work:
    """What one step asks of one device: effective FLOPs (saturation applied), bytes moved, optimizer bytes."""

    flops: float
    bytes: float
    optimizer: float
    model_flops: float
    hardware_flops: float


def work(
    a: Architecture, layout: Layout, p: Precision, sequence_length: int, global_batch: int, kind: str,
    trainable: float = 1.0,
) -> Work:  # fmt: skip
    """FLOPs and bytes of one optimizer step on one device; see the module's formula."""
    counted = flops_per_token(a, sequence_length, recompute=layout.recompute)
    real: Flops = flops_per_token(a, sequence_length, recompute=layout.recompute, attention="causal")
    tokens = global_batch * sequence_length
    # Frozen weights need no gradient of their own: a third of forward and backward falls away.
    mine = tokens * (real.hardware - (1 - trainable) * real.forward) / layout.devices
    held = count(a).total / (layout.tensor * layout.pipeline)
    return Work(
        flops=mine / saturation(a, layout, kind),
        bytes=_PASSES[kind] * traffic(a, layout, sequence_length, p.compute) * tokens / layout.data,
        optimizer=held * trainable * p.gradients / (layout.shard if layout.zero else 1) * _OPTIMIZER_PASSES,
        model_flops=tokens * (counted.model - (1 - trainable) * counted.forward),
        hardware_flops=tokens * (counted.hardware - (1 - trainable) * counted.forward),
    )  # fmt: skip


def peak_flops(hardware: Hardware, p: Precision) -> float:
    """FLOP/s of the precision's arithmetic; single precision where the device has none of it."""
    return hardware.flops(p.dtype if p.dtype in hardware.peak else "fp32")


def step_time(
    config: Mapping[str, Any] | Architecture, *, sequence_length: int, global_batch: int, hardware: Hardware,
    layout: Layout | None = None, precision_name: str | Precision = "fp32", trainable: float = 1.0,
    overlap: Mapping[str, float] | None = None,
) -> StepTime:  # fmt: skip
    """Predicted time of one optimizer step.

    Args:
        config: Hugging Face config or its `Architecture`.
        sequence_length: tokens a sequence.
        global_batch: sequences a step over all workers.
        hardware: the device (`find_hardware`), with its efficiency.
        layout: degrees of parallelism; None = one worker that takes the batch at once.
        precision_name: decides which peak counts and the bytes moved.
        trainable: share of the weights that get gradients (adapters: nearly 0).
        overlap: share of each kind of communication that hides behind compute; None = `OVERLAP` on GPUs
            and TPUs, nothing on a CPU, whose cores do both.

    Raises:
        RecipeError: bad config, or the device lacks the arithmetic.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    layout = layout or Layout(micro_batch=global_batch)
    p = precision(precision_name)
    micro_batches = max(layout.micro_batches(global_batch), 1)
    w = work(a, layout, p, sequence_length, global_batch, hardware.kind, trainable)
    peak = peak_flops(hardware, p)
    compute = w.flops / (peak * hardware.efficiency) + w.bytes / hardware.bandwidth
    hidden = overlap if overlap is not None else ({} if hardware.kind == "cpu" else OVERLAP)
    parts = communication(a, layout, hardware, p, sequence_length, micro_batches)
    exposed = sum(seconds * (1 - hidden.get(kind, 0.0)) for kind, seconds in parts.items())
    waiting = compute * bubble(layout, micro_batches)
    updating = w.optimizer / hardware.bandwidth
    step = compute + waiting + exposed + updating
    return StepTime(
        compute=compute, bubble=waiting, communication=exposed, optimizer=updating,
        flops=w.hardware_flops, mfu=w.model_flops / (step * layout.devices * peak),
    )  # fmt: skip


def forward_seconds(
    config: Mapping[str, Any] | Architecture, tokens: float, *, sequence_length: int, hardware: Hardware,
    precision_name: str | Precision = "fp32",
) -> float:  # fmt: skip
    """Predicted time of forward passes over `tokens` on one device, nothing kept for a backward pass.

    Raises:
        RecipeError: bad config, or the device lacks the arithmetic.
    """
    a = config if isinstance(config, Architecture) else parse(config)
    p, layout = precision(precision_name), Layout()
    flops = flops_per_token(a, sequence_length, attention="causal").forward / saturation(a, layout, hardware.kind)
    moved = _PASSES[hardware.kind] / 2 * traffic(a, layout, sequence_length, p.compute)
    return tokens * (flops / (peak_flops(hardware, p) * hardware.efficiency) + moved / hardware.bandwidth)


def check_positive(**values: float | None) -> None:
    """Raises RecipeError for the first value given that is zero, negative or not a number."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise RecipeError(f"{name} is {value}", place=name, mend=f"give {name} above zero")
