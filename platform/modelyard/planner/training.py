"""The estimate of a whole training run: what `modelyard plan` shows for pretrain and finetune stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from modelyard.errors import ResourceError
from modelyard.planner import formatting as fmt
from modelyard.planner.architecture import parse
from modelyard.planner.cost import price
from modelyard.planner.estimate import Estimate
from modelyard.planner.flops import flops_per_token
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.layout import Layout, validate
from modelyard.planner.memory import TrainingMemory, training_memory
from modelyard.planner.parameters import count
from modelyard.planner.time import StepTime, check_positive, step_time

LOSS_CHUNK = {"cpu": 8.0 * 2**20, "gpu": 256.0 * 2**20, "tpu": 256.0 * 2**20}
"""Bytes of logits the training loop makes at once: its output layer is fused with the loss."""
PROCESS_BYTES = 600 * 2**20
"""What a Ray Train worker with torch and transformers imported holds besides its tensors (measured, CPU build)."""
DEVICE_BYTES = 1.5 * 2**30
"""CUDA context, cuBLAS workspace and NCCL buffers of a GPU worker."""
_IDLE = frozenset(("architectures", "torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id",
                   "pad_token_id", "initializer_range", "rms_norm_eps", "layer_norm_epsilon", "rope_theta",
                   "return_dict", "output_hidden_states", "output_attentions", "use_cache"))  # fmt: skip
"""Keys of a config that decide no shape."""


def training_flops(config: Mapping[str, Any], tokens: float, sequence_length: int, trainable: float = 1.0) -> float:
    """Model FLOPs of training on `tokens`, attention included, without recomputation.

    `trainable` is the share of the weights that get gradients: frozen ones ask for a third less.
    """
    per_token = flops_per_token(config, sequence_length)
    return (per_token.model - (1 - trainable) * per_token.forward) * tokens


def estimate_training(
    config: Mapping[str, Any], tokens: float, sequence_length: int, global_batch: int, workers: int = 1,
    hardware: str | Hardware | None = None, *, layout: Layout | None = None, micro_batch: int | None = None,
    recompute: str = "none", optimizer: str = "adamw", precision_name: str = "fp32", trainable: int | None = None,
    cores_per_worker: float = 1.0, efficiency: float | None = None, memory_limit: int | None = None,
    spot: bool = False, utilisation: float = 0.9, fused_loss: bool = False, frozen_bits: float | None = None,
) -> Estimate:  # fmt: skip
    """Predicts parameters, FLOPs, memory a worker, wall time, cost and energy of a training run.

    Args:
        config: Hugging Face config of the model.
        tokens: tokens trained on in all.
        sequence_length: tokens a sequence.
        global_batch: sequences an optimizer step over all workers.
        workers: data-parallel workers, one device each (on a CPU `cores_per_worker` cores each).
        hardware: name in the hardware table, an own `Hardware`, or None for this machine.
        layout: full layout; None = FSDP over the workers.
        micro_batch: sequences a forward pass and worker; None = its whole share of the batch.
        recompute: `none`, `selective`, `full`.
        optimizer: see `memory.training_memory`.
        precision_name: `fp32`, `mixed`, `master`, `bf16`.
        trainable: trained parameters (adapters); None = all.
        cores_per_worker: cores a CPU worker computes with.
        efficiency: measured share of the peak; None = the table's.
        memory_limit: bytes a worker may use; None = the device's memory (RAM divided by workers on a CPU).
        spot: price of spot capacity.
        utilisation: mean power over the device's rated power.
        fused_loss: whether the output layer is fused with the loss, as in this package's training loop.
        frozen_bits: bits a parameter of the blocks' matrices where adapters leave them quantized; None = as they are.

    Raises:
        RecipeError: bad config, batch or unknown hardware.
        ResourceError: a worker's peak memory is above the limit.
    """
    check_positive(tokens=tokens, sequence_length=sequence_length, global_batch=global_batch, workers=workers)
    hw = find_hardware(hardware)
    hw = worker_hardware(hw if efficiency is None else hw.calibrated(efficiency), cores_per_worker)
    mine = max(global_batch // workers, 1)
    layout = layout or Layout(data=workers, shard=workers, micro_batch=micro_batch or mine, recompute=recompute)  # type: ignore[arg-type]
    a = parse(config)
    validate(layout, a, sequence_length, global_batch)
    p = count(a)
    memory = training_memory(
        a, sequence_length=sequence_length, layout=layout, optimizer=optimizer, precision_name=precision_name,
        micro_batches=layout.micro_batches(global_batch), trainable=trainable,
        loss_chunk=LOSS_CHUNK[hw.kind] if fused_loss else None,
        overhead=PROCESS_BYTES if hw.kind == "cpu" else DEVICE_BYTES, frozen_bits=frozen_bits,
    )  # fmt: skip
    fits(memory, hw, layout.devices, memory_limit)
    share = 1.0 if trainable is None else min(trainable / p.total, 1.0)
    step = step_time(
        a, sequence_length=sequence_length, global_batch=global_batch, hardware=hw, layout=layout,
        precision_name=precision_name, trainable=share,
    )  # fmt: skip
    seconds = step.seconds * tokens / (global_batch * sequence_length)
    hours = seconds / 3600 * layout.devices
    rate = price(hw, spot)
    return Estimate(
        parameters=p.total, tokens=int(tokens), flops=training_flops(config, tokens, sequence_length, share),
        memory_bytes=int(memory.peak), seconds=seconds, cost_usd=None if rate is None else rate * hours,
        energy_kwh=hours * hw.watts * utilisation / 1000, notes=_notes(p.exact, layout, hw, step, memory),
        memory_parts=tuple(memory.rows()),
        basis={
            "config": essential(config), "sequence_length": sequence_length, "global_batch": global_batch,
            "layout": asdict(layout), "precision": precision_name, "trainable": share, "hardware": hw.name,
            "cores": cores_per_worker, "optimizer": optimizer, "tokens": int(tokens), "step_seconds": step.seconds,
        },
    )  # fmt: skip


def essential(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a config that decide its shape: plain values and short lists, without names, ids and labels."""
    plain = (bool, int, float, str, list)
    found = {k: v for k, v in config.items() if isinstance(v, plain) and not k.startswith("_") and k not in _IDLE}
    return {k: v for k, v in found.items() if not isinstance(v, list) or all(isinstance(x, int | str) for x in v)}


def worker_hardware(hw: Hardware, cores: float) -> Hardware:
    """The device of one worker: on a CPU the table's core so many times."""
    return several_cores(hw, cores) if hw.kind == "cpu" and hw.cores <= 1 else hw


def several_cores(hw: Hardware, cores: float) -> Hardware:
    """A worker of `cores` cores as one device; twice the cores do a little less than twice the work."""
    scale = cores**0.95
    return replace(
        hw, peak={k: v * scale for k, v in hw.peak.items()}, watts=hw.watts * cores, cores=max(round(cores), 1)
    )


def fits(memory: TrainingMemory, hw: Hardware, workers: int, limit: int | None) -> None:
    """Raises ResourceError when a worker's peak is above `limit` or the device's memory, naming what weighs most."""
    room = limit if limit is not None else hw.memory / (workers if hw.name == "this-machine" else 1)
    if memory.peak <= room:
        return
    name, largest = max(memory.rows(), key=lambda row: row[1])
    mends = {
        "activations": "a smaller micro_batch, or recompute: full",
        "logits": "a smaller micro_batch or vocabulary",
        "overhead": "fewer workers on this machine",
    }
    raise ResourceError(
        f"a worker would need {fmt.size(memory.peak)} and has {fmt.size(room)}",
        place=f"memory, mostly {name} ({fmt.size(largest)})",
        mend="use " + mends.get(name, "more workers to shard over, or a smaller model"),
    )


def _notes(exact: bool, layout: Layout, hw: Hardware, step: StepTime, memory: TrainingMemory) -> tuple[str, ...]:
    notes = [f"{layout.label()} on {layout.devices} x {hw.name}, MFU {fmt.share(step.mfu)}"]
    notes.append("memory peaks at the " + {"loss": "loss", "backward": "end of backward"}.get(memory.moment, "step"))
    if not exact:
        notes.append("unknown model_type: counted as a Llama block")
    return tuple(notes)
