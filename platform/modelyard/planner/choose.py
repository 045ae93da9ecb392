"""What to train with a given budget: model size and tokens by a scaling law, as a config that fits the hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modelyard.errors import RecipeError
from modelyard.planner.cost import cost, price
from modelyard.planner.estimate import Estimate
from modelyard.planner.flops import flops_per_token
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.layout import Layout, nearest_divisor
from modelyard.planner.memory import training_memory
from modelyard.planner.parameters import count
from modelyard.planner.scaling import Chinchilla, Law
from modelyard.planner.time import StepTime, check_positive, step_time
from modelyard.planner.training import DEVICE_BYTES, PROCESS_BYTES, several_cores


@dataclass(frozen=True)
class Choice:
    """A model and a number of tokens that use up a budget, with the loss the law predicts."""

    config: Mapping[str, Any]
    parameters: int
    tokens: float
    hours: float
    usd: float | None
    loss: float
    optimal: bool
    estimate: Estimate
    note: str


def llama_shape(parameters: float, vocab_size: int, sequence_length: int = 2048) -> dict[str, Any]:
    """A Llama config near a number of parameters: width 64 a layer up to 128 for large models, heads of 64 or 128.

    Small models tie their embeddings.
    """
    best: tuple[float, dict[str, Any]] | None = None
    for layers in range(2, 129):
        for ratio in (32, 48, 64, 96, 128):
            head = 32 if layers * ratio < 512 else 64 if layers * ratio < 2048 else 128
            # Heads in fours and eights, so that tensor parallelism and key-value groups divide them.
            step = head * (8 if head == 128 else 4 if head == 64 else 2)
            hidden = max(round(layers * ratio / step), 1) * step
            config = _shape(hidden, layers, hidden // head, vocab_size, sequence_length)
            # A mild pull to the middle ratio decides between shapes of nearly the same size.
            miss = abs(count(config).total / parameters - 1) + 0.01 * abs(ratio - 64) / 64
            if best is None or miss < best[0]:
                best = (miss, config)
    assert best is not None
    return best[1]


def _shape(hidden: int, layers: int, heads: int, vocab_size: int, sequence_length: int) -> dict[str, Any]:
    ffn = -(-hidden * 8 // 3 // 64) * 64
    # Eight key-value heads as Llama 3 has; fewer where the model has fewer heads.
    kv = nearest_divisor(heads, min(8, heads // 2))
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": vocab_size,
        "max_position_embeddings": sequence_length, "tie_word_embeddings": hidden < 2048,
    }  # fmt: skip


def choose(
    *, budget_usd: float | None = None, hours: float | None = None, hardware: str | Hardware | None = None,
    devices: int = 1, cores_per_worker: float = 1.0, sequence_length: int = 2048, vocab_size: int = 32_000,
    law: Law | None = None, precision_name: str | None = None, tokens_available: float | None = None,
    spot: bool = False, config: Mapping[str, Any] | None = None,
) -> Choice:  # fmt: skip
    """Chooses model size and tokens for a budget of money, of hours, or of both (the smaller one counts).

    Args:
        budget_usd: US dollars for all devices.
        hours: wall hours.
        hardware: device; None = this machine.
        devices: how many of them.
        cores_per_worker: cores of one device, on a CPU.
        sequence_length: tokens a sequence.
        vocab_size: of the tokenizer.
        law: scaling law; None = Hoffmann et al.'s. Use `fitting.fit(runs).law` for one's own.
        precision_name: None = `mixed` on GPUs, `fp32` on a CPU.
        tokens_available: unique tokens there are; more than four passes over them are not planned
            (Muennighoff et al., arXiv 2305.16264).
        spot: spend the money on spot capacity.
        config: a fixed model: only the tokens are chosen.

    Raises:
        RecipeError: no budget, a budget that is not positive, hardware without a price, or one too small
            for a thousand steps' worth of tokens on the smallest model.
    """
    check_positive(budget_usd=budget_usd, hours=hours, devices=devices, tokens_available=tokens_available)
    hw = find_hardware(hardware)
    hw = several_cores(hw, cores_per_worker) if hw.kind == "cpu" and hw.cores <= 1 else hw
    wall = _hours(budget_usd, hours, hw, devices, spot)
    law, name = law or Chinchilla(), precision_name or ("fp32" if hw.kind == "cpu" else "mixed")
    spent = _solve(hw, devices, wall, sequence_length, vocab_size, law, name, config)
    shape, tokens, step, layout = spent
    note = "compute-optimal by the scaling law"
    if tokens_available is not None and tokens > 4 * tokens_available:
        note = f"data-limited: four passes over the {tokens_available:.3g} tokens there are"
        tokens = 4 * tokens_available
    p = count(shape)
    seconds = step.seconds * tokens / (_batch(devices) * sequence_length)
    money = cost(seconds / 3600, devices, hw)
    usd = money.spot_usd if spot else money.on_demand_usd
    memory = training_memory(
        shape, sequence_length=sequence_length, layout=layout, precision_name=name,
        micro_batches=layout.micro_batches(_batch(devices)),
        overhead=PROCESS_BYTES if hw.kind == "cpu" else DEVICE_BYTES,
    )  # fmt: skip
    estimate = Estimate(
        parameters=p.total, tokens=int(tokens), flops=flops_per_token(shape, sequence_length).model * tokens,
        memory_bytes=int(memory.peak), seconds=seconds, cost_usd=usd, energy_kwh=money.kwh,
        notes=(f"{layout.label()} on {devices} x {hw.name}", note), memory_parts=tuple(memory.rows()),
        basis={"config": dict(shape), "tokens": int(tokens), "sequence_length": sequence_length},
    )  # fmt: skip
    return Choice(
        config=shape, parameters=p.total, tokens=tokens, hours=seconds / 3600, usd=usd,
        loss=law.loss(p.total, tokens), optimal=config is None, estimate=estimate, note=note,
    )  # fmt: skip


def _hours(budget: float | None, hours: float | None, hw: Hardware, devices: int, spot: bool) -> float:
    """Wall hours the budget allows."""
    limits = [] if hours is None else [hours]
    if budget is not None:
        rate = price(hw, spot)
        if rate is None:
            raise RecipeError(f"{hw.name} has no price", place="budget", mend="give --hours, or a price of your own")
        limits.append(budget / (rate * devices))
    if not limits:
        raise RecipeError("no budget", place="budget", mend="give --budget 500USD or --hours 24")
    return min(limits)


def _batch(devices: int) -> int:
    """Sequences a step: 16 a device, the default micro-batch of the training loop."""
    return 16 * devices


def _solve(
    hw: Hardware, devices: int, hours: float, sequence_length: int, vocab_size: int, law: Law, name: str,
    config: Mapping[str, Any] | None,
) -> tuple[Mapping[str, Any], float, StepTime, Layout]:  # fmt: skip
    """Model and tokens: the speed depends on the size, so the size is found by a few rounds from a guess."""
    guess = hours * 3600 * devices * max(hw.peak.values()) * hw.efficiency
    shape: Mapping[str, Any] = config or llama_shape(law.optimal(guess)[0], vocab_size, sequence_length)
    for _ in range(1 if config else 6):
        layout = plain_layout(shape, hw, devices, sequence_length, name)
        step = step_time(
            shape, sequence_length=sequence_length, global_batch=_batch(devices), hardware=hw, layout=layout,
            precision_name=name,
        )  # fmt: skip
        tokens = hours * 3600 / step.seconds * _batch(devices) * sequence_length
        wanted = law.optimal(6 * count(shape).total * tokens)[0]
        if config is None and abs(wanted / count(shape).total - 1) > 0.05:
            shape = llama_shape(wanted, vocab_size, sequence_length)
    layout = plain_layout(shape, hw, devices, sequence_length, name)
    step = step_time(
        shape, sequence_length=sequence_length, global_batch=_batch(devices), hardware=hw, layout=layout,
        precision_name=name,
    )  # fmt: skip
    tokens = hours * 3600 / step.seconds * _batch(devices) * sequence_length
    if tokens < 100 * _batch(devices) * sequence_length:
        least = hours * 100 * _batch(devices) * sequence_length / tokens
        raise RecipeError(
            f"the budget is {hours:.3g} h on {devices} x {hw.name}, less than a hundred steps of a model",
            place="budget", mend=f"give at least {least:.2g} h, or shorter sequences",
        )  # fmt: skip
    return shape, tokens, step, layout


def plain_layout(shape: Mapping[str, Any], hw: Hardware, devices: int, sequence_length: int, name: str) -> Layout:
    """The plainest layout that fits: FSDP with the largest micro-batch and the least recomputation.

    Raises:
        RecipeError: nothing fits.
    """
    room = hw.memory * 0.94 / (devices if hw.name == "this-machine" else 1)
    plans = [(m, r) for r in ("none", "selective", "full") for m in (16, 8, 4, 2, 1)]
    for micro_batch, recompute in plans:
        layout = Layout(data=devices, shard=devices, micro_batch=micro_batch, recompute=recompute, sync_each=True)  # type: ignore[arg-type]
        memory = training_memory(
            shape, sequence_length=sequence_length, layout=layout, precision_name=name,
            micro_batches=layout.micro_batches(_batch(devices)),
            overhead=PROCESS_BYTES if hw.kind == "cpu" else DEVICE_BYTES,
        )  # fmt: skip
        if memory.peak <= room:
            return layout
    raise RecipeError(
        f"a model of {count(shape).total / 1e9:.3g} B parameters does not fit {devices} x {hw.name}",
        place="budget", mend="use more devices or a smaller budget, or search layouts with tensor parallelism",
    )  # fmt: skip
