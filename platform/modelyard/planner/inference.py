"""Rates of inference from a roofline: prefill is bound by arithmetic, decode by reading weights and KV cache.

prefill seconds a token = forward FLOPs / (peak x efficiency)
decode seconds a step   = max(bytes read / (bandwidth x reach), batch x FLOPs / (peak x efficiency)) + overhead
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.errors import ResourceError
from modelyard.planner import formatting as fmt
from modelyard.planner.architecture import Architecture, parse
from modelyard.planner.cost import price
from modelyard.planner.flops import flops_per_token
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.memory import ServingMemory, kv_bytes_per_token, serving_memory
from modelyard.planner.parameters import count
from modelyard.planner.precision import DTYPE_BYTES
from modelyard.planner.time import check_positive

REACH = 0.8
"""Share of the memory bandwidth that kernels reach."""
STEP_OVERHEAD = {"gpu": 0.0005, "tpu": 0.001, "cpu": 0.004}
"""Seconds a decode step costs beside arithmetic and memory: launches, scheduling, sampling."""
UTILISATION = 0.7
"""Share of a replica's throughput to plan with: above it queues grow long."""


@dataclass(frozen=True)
class Rates:
    """Speeds of one replica at one batch size; tokens a second of the replica, seconds of a request."""

    batch: int
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    time_to_first_token: float
    time_per_token: float
    requests_per_second: float
    memory: ServingMemory


@dataclass(frozen=True)
class Deployment:
    """How many replicas a load needs, at which batch, and what it costs."""

    replicas: int
    devices: int
    rates: Rates
    usd_per_hour: float | None
    usd_per_million_tokens: float | None
    note: str


def rates(
    config: Mapping[str, Any] | Architecture, hw: Hardware, *, batch: int, prompt: int, answer: int,
    dtype: str = "bf16", tensor: int = 1,
) -> Rates:  # fmt: skip
    """Predicted speeds of one replica.

    Args:
        config: Hugging Face config or its `Architecture`.
        hw: the device.
        batch: requests decoded together.
        prompt: tokens of a prompt.
        answer: tokens generated.
        dtype: of the weights.
        tensor: devices a replica.

    Raises:
        RecipeError: non-positive numbers, or a dtype the device has no arithmetic for.
    """
    check_positive(batch=batch, prompt=prompt, answer=answer, tensor=tensor)
    a = config if isinstance(config, Architecture) else parse(config)
    width = DTYPE_BYTES[dtype]
    arithmetic = dtype if dtype in hw.peak else "bf16" if "bf16" in hw.peak else "fp32"
    peak = hw.flops(arithmetic) * hw.efficiency * tensor
    p = count(a)
    prefill = flops_per_token(a, prompt, attention="causal").forward / peak + _reduce(a, hw, tensor)
    context = prompt + answer / 2
    # A mixture reads every expert its batch touches.
    read = min(p.active - p.embedding + (p.total - p.active) * min(1.0, batch / 8), p.total)
    read += p.embedding if a.tied else 0
    bytes_read = read * width / tensor + batch * context * kv_bytes_per_token(a, "bf16", tensor)
    arithmetic_seconds = batch * flops_per_token(a, max(int(context), 1)).forward / peak
    step = max(bytes_read / (hw.bandwidth * REACH), arithmetic_seconds)
    step += STEP_OVERHEAD[hw.kind] + batch * _reduce(a, hw, tensor)
    seconds = prompt * prefill + answer * step / batch
    return Rates(
        batch=batch, prefill_tokens_per_second=1 / prefill, decode_tokens_per_second=batch / step,
        time_to_first_token=prompt * prefill + step, time_per_token=step, requests_per_second=1 / seconds,
        memory=serving_memory(a, sequences=batch, sequence_length=prompt + answer, dtype=dtype, tensor=tensor),
    )  # fmt: skip


def _reduce(a: Architecture, hw: Hardware, tensor: int) -> float:
    """Seconds of a token's two all-reduces a layer among `tensor` devices."""
    if tensor == 1:
        return 0.0
    return 2 * 2 * a.depth * a.hidden * 2 * (tensor - 1) / tensor / (hw.intra if tensor <= hw.node else hw.inter)


def largest_batch(
    config: Mapping[str, Any], hw: Hardware, *, prompt: int, answer: int, dtype: str = "bf16", tensor: int = 1,
    time_per_token: float | None = None, time_to_first_token: float | None = None, most: int = 1024,
) -> Rates:  # fmt: skip
    """The largest batch that fits the memory and meets the latency targets (seconds).

    Raises:
        ResourceError: not even one request fits or meets a target; says by how much it misses.
    """
    a = parse(config)
    best: Rates | None = None
    batch = 1
    while batch <= most:
        tried = rates(a, hw, batch=batch, prompt=prompt, answer=answer, dtype=dtype, tensor=tensor)
        slow = time_per_token is not None and tried.time_per_token > time_per_token
        late = time_to_first_token is not None and tried.time_to_first_token > time_to_first_token
        if tried.memory.peak > 0.94 * hw.memory or slow or late:
            if best is None:
                raise _misses(tried, hw, time_per_token, time_to_first_token)
            break
        best = tried
        batch = batch + 1 if batch < 8 else int(batch * 1.25)
    assert best is not None
    return best


def _misses(tried: Rates, hw: Hardware, time_per_token: float | None, first: float | None) -> ResourceError:
    if tried.memory.peak > 0.94 * hw.memory:
        return ResourceError(
            f"one request needs {fmt.size(tried.memory.peak)} and {hw.name} has {fmt.size(hw.memory)}",
            place="memory", mend="use more tensor-parallel devices, int8 or int4 weights, or a larger device",
        )  # fmt: skip
    if time_per_token is not None and tried.time_per_token > time_per_token:
        return ResourceError(
            f"a token takes {fmt.duration(tried.time_per_token)} alone and {fmt.duration(time_per_token)} is asked",
            place="latency target", mend="use more tensor-parallel devices, narrower weights or a faster device",
        )  # fmt: skip
    return ResourceError(
        f"the first token takes {fmt.duration(tried.time_to_first_token)} and {fmt.duration(first)} is asked",
        place="latency target", mend="use more tensor-parallel devices, a faster device or shorter prompts",
    )  # fmt: skip


def deploy(
    config: Mapping[str, Any], *, hardware: str | Hardware, requests_per_second: float, prompt: int, answer: int,
    dtype: str = "bf16", tensor: int = 1, time_per_token: float | None = 0.05,
    time_to_first_token: float | None = 2.0,
) -> Deployment:  # fmt: skip
    """Replicas for a load under latency targets, and their cost.

    Args:
        config: Hugging Face config.
        hardware: device of the table, or an own one.
        requests_per_second: the load to serve.
        prompt: mean prompt tokens.
        answer: mean generated tokens.
        dtype: of the weights.
        tensor: devices a replica.
        time_per_token: seconds between tokens at most; None = no limit.
        time_to_first_token: seconds to the first token at most, without queueing; None = no limit.
    """
    check_positive(requests_per_second=requests_per_second)
    hw = find_hardware(hardware)
    found = largest_batch(
        config, hw, prompt=prompt, answer=answer, dtype=dtype, tensor=tensor, time_per_token=time_per_token,
        time_to_first_token=time_to_first_token,
    )  # fmt: skip
    replicas = max(-(-requests_per_second // (found.requests_per_second * UTILISATION)), 1)
    rate = price(hw)
    hourly = None if rate is None else rate * replicas * tensor
    tokens = requests_per_second * (prompt + answer) * 3600
    return Deployment(
        replicas=int(replicas), devices=int(replicas) * tensor, rates=found, usd_per_hour=hourly,
        usd_per_million_tokens=None if hourly is None else hourly / tokens * 1e6,
        note=f"batch {found.batch}, {UTILISATION:.0%} of {found.requests_per_second:.3g} requests/s a replica",
    )  # fmt: skip
