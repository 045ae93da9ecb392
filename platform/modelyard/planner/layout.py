"""A layout: how many devices share what, and whether a model and a batch can be cut that way at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelyard.errors import RecipeError
from modelyard.planner.architecture import Architecture
from modelyard.planner.flops import Recompute

Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev"]
SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "interleaved", "zero-bubble", "zbv", "dualpipev")


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a training run; every degree is 1 when not used.

    Attributes:
        data: data-parallel workers, replicated and sharded ones together.
        shard: workers among which the states are sharded (FSDP); must divide `data`. `shard < data` is HSDP.
        zero: what is sharded: 0 nothing (DDP), 1 optimizer, 2 and gradients, 3 and parameters (FSDP).
        tensor: tensor-parallel devices; `sequence_parallel` also splits norms and residuals among them.
        pipeline: stages, with `schedule` and `virtual` chunks of layers a stage.
        context: devices one sequence is split over.
        expert: devices the experts of one layer are spread over; cut out of the data-parallel ones.
        micro_batch: sequences in one forward pass of one worker.
        recompute: activations computed again in backward.
        sync_each: gradients are reduced after every micro-batch; false = kept whole until the last one.
        offload: optimizer states and sharded parameters live in the host's memory.
    """

    data: int = 1
    shard: int = 1
    zero: int = 3
    tensor: int = 1
    sequence_parallel: bool = True
    pipeline: int = 1
    schedule: Schedule = "1f1b"
    virtual: int = 1
    context: int = 1
    expert: int = 1
    micro_batch: int = 1
    recompute: Recompute = "none"
    sync_each: bool = True
    offload: bool = False

    @property
    def devices(self) -> int:
        """Devices in all."""
        return self.data * self.tensor * self.pipeline * self.context

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches each worker runs for one optimizer step."""
        return global_batch // (self.data * self.micro_batch)

    def label(self) -> str:
        """`FSDP 8 x TP 4 x PP 2, micro-batch 1, full recompute`."""
        kind = "FSDP" if self.zero == 3 else f"ZeRO-{self.zero}" if self.zero else "DDP"
        parts = [f"{kind} {self.data}" if self.shard == self.data or not self.zero else
                 f"HSDP {self.data // self.shard}x{self.shard}"]  # fmt: skip
        for name, degree in (("TP", self.tensor), ("PP", self.pipeline), ("CP", self.context), ("EP", self.expert)):
            if degree > 1:
                parts.append(f"{name} {degree}")
        tail = f", micro-batch {self.micro_batch}"
        if self.pipeline > 1:
            tail += f", {self.schedule}" + (f" x{self.virtual}" if self.virtual > 1 else "")
        return " x ".join(parts) + tail + (f", {self.recompute} recompute" if self.recompute != "none" else "")


def nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` closest to `wanted`; the smaller one of two equally close."""
    divisors = [d for d in range(1, value + 1) if value % d == 0] if value < 100_000 else [1, value]
    return min(divisors, key=lambda d: (abs(d - wanted), d))


def _divides(what: str, whole: int, name: str, degree: int) -> None:
    if whole % degree:
        near = nearest_divisor(whole, degree)
        raise RecipeError(
            f"{what} ({whole}) cannot be divided by {name} {degree}",
            place="layout",
            mend=f"the nearest {name} that divides {whole} is {near}",
        )


def validate(layout: Layout, model: Architecture, sequence_length: int, global_batch: int) -> None:
    """Checks that a model and a batch can be cut as the layout says.

    Args:
        layout: the layout.
        model: the model.
        sequence_length: tokens a sequence.
        global_batch: sequences an optimizer step, over all workers.

    Raises:
        RecipeError: the first constraint that fails, with the nearest value that satisfies it.
    """
    for name in ("data", "shard", "tensor", "pipeline", "virtual", "context", "expert", "micro_batch"):
        if getattr(layout, name) < 1:
            raise RecipeError(f"{name} is {getattr(layout, name)}", place="layout", mend=f"use {name} 1 or more")
    if layout.zero not in (0, 1, 2, 3):
        raise RecipeError(f"zero is {layout.zero}", place="layout", mend="use 0 (DDP), 1, 2 or 3 (FSDP)")
    if layout.schedule not in SCHEDULES:
        raise RecipeError(f"unknown schedule {layout.schedule!r}", place="layout", mend="use " + ", ".join(SCHEDULES))
    for layer in model.stack():
        _divides("the number of attention heads", layer.heads, "tensor parallel", layout.tensor)
        if layer.kv_heads % layout.tensor and layout.tensor % layer.kv_heads:
            _divides("the number of key-value heads", layer.kv_heads, "tensor parallel", layout.tensor)
        _divides("the FFN's width", layer.ffn_width, "tensor parallel", layout.tensor)
        if layer.experts > 1:
            _divides("the number of experts", layer.experts, "expert parallel", layout.expert)
    if layout.expert > 1 and all(layer.experts == 1 for layer in model.stack()):
        raise RecipeError(
            f"expert parallel {layout.expert} on a model without experts", place="layout", mend="use expert 1"
        )
    _divides("the number of layers", model.depth, "pipeline parallel x virtual", layout.pipeline * layout.virtual)
    _divides("the sequence length", sequence_length, "context parallel", layout.context)
    _divides("the data-parallel workers", layout.data, "shard", layout.shard)
    _divides("the data-parallel workers", layout.data, "expert parallel", layout.expert)
    _batch(layout, global_batch)


def _batch(layout: Layout, global_batch: int) -> None:
    if global_batch < 1:
        raise RecipeError(f"global_batch is {global_batch}", place="layout", mend="use 1 or more sequences")
    step = layout.data * layout.micro_batch
    if global_batch % step:
        near = max(round(global_batch / step), 1) * step
        raise RecipeError(
            f"a global batch of {global_batch} sequences cannot be divided by {layout.data} workers x micro-batch "
            f"{layout.micro_batch}",
            place="layout",
            mend=f"the nearest feasible global batch is {near}",
        )
