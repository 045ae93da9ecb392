"""Layout search: every way to cut a model over given devices, which ones fit, how fast they are and why others lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from modelyard.errors import RecipeError, ResourceError
from modelyard.planner import formatting as fmt
from modelyard.planner.architecture import Architecture, parse
from modelyard.planner.flops import Recompute
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.layout import Layout, Schedule, nearest_divisor, validate
from modelyard.planner.memory import TrainingMemory, training_memory
from modelyard.planner.time import StepTime, check_positive, step_time
from modelyard.planner.training import DEVICE_BYTES

_RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
RESERVE = 0.06
"""Share of the device's memory left free for fragmentation and communication buffers."""


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: its memory, its step time and, for all but the best, why it is slower."""

    layout: Layout
    memory: TrainingMemory
    step: StepTime
    reason: str = ""

    @property
    def tokens_per_second_unit(self) -> float:
        """Inverse of the step time: candidates compare by it."""
        return 1 / self.step.seconds


@dataclass(frozen=True)
class Search:
    """What a search found: candidates best first, and how many layouts each reason ruled out."""

    candidates: tuple[Candidate, ...]
    rejected: Mapping[str, int]
    tried: int

    @property
    def best(self) -> Candidate:
        """The fastest layout."""
        return self.candidates[0]


def _divisors(value: int, most: int) -> list[int]:
    return [d for d in range(1, min(value, most) + 1) if value % d == 0]


def _schedules(a: Architecture, pipeline: int) -> Iterator[tuple[Schedule, int]]:
    """1F1B, and interleaving with as many chunks a stage as layers allow (2 to 4)."""
    if pipeline == 1:
        yield "1f1b", 1
        return
    yield "1f1b", 1
    for virtual in (2, 4):
        if a.depth % (pipeline * virtual) == 0:
            yield "interleaved", virtual


def layouts(a: Architecture, devices: int, node: int, sequence_length: int, global_batch: int) -> Iterator[Layout]:
    """Layouts worth looking at: tensor parallelism inside a node, context parallelism only for long sequences."""
    experts = max(layer.experts for layer in a.stack())
    for tensor in _divisors(devices, node):
        for pipeline in _divisors(devices // tensor, a.depth):
            if a.depth % pipeline:
                continue
            rest = devices // tensor // pipeline
            for context in (c for c in (1, 2, 4, 8, 16) if rest % c == 0 and (c == 1 or sequence_length // c >= 4096)):
                data = rest // context
                if data > global_batch:
                    continue
                for expert in [e for e in _divisors(data, experts) if experts % e == 0]:
                    for zero in (1, 3) if data > 1 else (1,):
                        base = Layout(
                            data=data, shard=data, zero=zero, tensor=tensor, pipeline=pipeline, context=context,
                            expert=expert,
                        )  # fmt: skip
                        yield from _batches(a, base, global_batch)


def _batches(a: Architecture, base: Layout, global_batch: int) -> Iterator[Layout]:
    """The layout with every schedule and micro-batch that divides the batch, and its HSDP form across nodes."""
    for schedule, virtual in _schedules(a, base.pipeline):
        for micro_batch in (1, 2, 4, 8):
            if global_batch % (base.data * micro_batch) == 0:
                yield replace(base, schedule=schedule, virtual=virtual, micro_batch=micro_batch)


def _hybrid(layout: Layout, node: int) -> Iterator[Layout]:
    """Sharding inside a node only (HSDP), where a node holds several data-parallel workers."""
    inside = node // (layout.tensor * layout.context) if layout.tensor * layout.context <= node else 1
    if layout.zero == 3 and 1 < inside < layout.data and layout.data % inside == 0:
        yield replace(layout, shard=inside)


def search(
    config: Mapping[str, Any], *, sequence_length: int, global_batch: int, devices: int,
    hardware: str | Hardware = "h100", precision_name: str = "mixed", optimizer: str = "adamw", keep: int = 20,
) -> Search:  # fmt: skip
    """Lists the layouts that fit, best first.

    Args:
        config: Hugging Face config.
        sequence_length: tokens a sequence.
        global_batch: sequences an optimizer step over all devices.
        devices: number of devices.
        hardware: name in the table, or a `Hardware` with own bandwidths.
        precision_name: see `precision.PRECISIONS`.
        optimizer: see `memory.training_memory`.
        keep: how many candidates to return.

    Raises:
        RecipeError: bad config, hardware, or no way to divide the batch over the devices.
        ResourceError: nothing fits; says what comes closest.
    """
    check_positive(devices=devices, sequence_length=sequence_length, global_batch=global_batch)
    a, hw = parse(config), find_hardware(hardware)
    rejected: Counter[str] = Counter()
    found: list[Candidate] = []
    closest: tuple[float, str] = (float("inf"), "")
    tried = 0
    for plain in layouts(a, devices, hw.node, sequence_length, global_batch):
        for layout in (plain, *_hybrid(plain, hw.node)):
            tried += 1
            try:
                validate(layout, a, sequence_length, global_batch)
            except RecipeError as error:
                rejected[error.what.split(" (")[0] + " cannot be divided as needed"] += 1
                continue
            candidate, peak = _fit(a, layout, hw, sequence_length, global_batch, precision_name, optimizer)
            if candidate is None:
                rejected["need more memory than the device has, even with full recomputation"] += 1
                closest = min(closest, (peak, layout.label()))
                continue
            found.append(candidate)
    if not found:
        raise _nothing(tried, closest, hw, devices, global_batch)
    found.sort(key=lambda c: c.step.seconds)
    best = found[0]
    kept = (best, *(replace(c, reason=why(c, best)) for c in found[1:keep]))
    return Search(kept, dict(rejected.most_common()), tried)


def _fit(
    a: Architecture, layout: Layout, hw: Hardware, sequence_length: int, global_batch: int, precision_name: str,
    optimizer: str,
) -> tuple[Candidate | None, float]:  # fmt: skip
    """The layout with the least recomputation that fits, or None and the smallest peak."""
    room = hw.memory * (1 - RESERVE)
    peak = float("inf")
    for recompute in _RECOMPUTE:
        tried = replace(layout, recompute=recompute)
        memory = training_memory(
            a, sequence_length=sequence_length, layout=tried, optimizer=optimizer, precision_name=precision_name,
            micro_batches=tried.micro_batches(global_batch), overhead=DEVICE_BYTES,
        )  # fmt: skip
        peak = min(peak, memory.peak)
        if memory.peak <= room:
            step = step_time(
                a, sequence_length=sequence_length, global_batch=global_batch, hardware=hw, layout=tried,
                precision_name=precision_name,
            )  # fmt: skip
            return Candidate(tried, memory, step), peak
        if recompute == "none" and a.layers[0].count and memory.parameters + memory.optimizer > room:
            return None, memory.parameters + memory.optimizer
    return None, peak


def why(candidate: Candidate, best: Candidate) -> str:
    """Why a candidate is slower than the best: the part of the step that grew most."""
    mine, other = candidate.step, best.step
    slower = mine.seconds / other.seconds - 1
    causes = {
        "pipeline bubble": mine.bubble - other.bubble,
        "exposed communication": mine.communication - other.communication,
        "optimizer traffic": mine.optimizer - other.optimizer,
    }
    repeated = candidate.layout.recompute != best.layout.recompute and mine.compute > other.compute
    causes["recomputation" if repeated else "narrower matrix products"] = mine.compute - other.compute
    cause, seconds = max(causes.items(), key=lambda item: item[1])
    if slower < 0.005:
        return "as fast within half a percent"
    return f"{fmt.share(slower)} slower: {cause} costs {fmt.duration(seconds)} more a step"


def _nothing(
    tried: int, closest: tuple[float, str], hw: Hardware, devices: int, global_batch: int
) -> RecipeError | ResourceError:
    if tried == 0 or not closest[1]:
        near = nearest_divisor(devices, min(devices, global_batch))
        return RecipeError(
            f"a batch of {global_batch} sequences cannot be spread over {devices} devices",
            place="global_batch",
            mend=f"use a multiple of {devices}, or {near} devices",
        )
    return ResourceError(
        f"no layout of {devices} x {hw.name} fits; the closest, {closest[1]}, needs {fmt.size(closest[0])} of "
        f"{fmt.size(hw.memory * (1 - RESERVE))}",
        place="layout",
        mend="use more devices, devices with more memory, an 8-bit optimizer or a shorter sequence",
    )
