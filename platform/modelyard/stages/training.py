"""What the stages that train share: options, checks and predictions before any work, reports after it. Light."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError, ModelyardError, RecipeError, ResourceError
from modelyard.models.options import AdapterOptions, ModelOptions, PromptOptions
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Resources, StageOptions, runtime
from modelyard.stages.base import PlanContext, StageContext
from modelyard.storage import Artifact, Files, exists, join, read_bytes
from modelyard.train.options import TrainOptions
from modelyard.train.parallel.layout import check_layout, degrees, micro_batches, plan_layout

if TYPE_CHECKING:
    from modelyard.planner.hardware import Hardware
    from modelyard.train.loop import Outcome

Config = dict[str, Any]

MODELS = ("pretrain", "finetune", "align", "merge")
"""Stage kinds whose artifact holds a language model under `model/`."""

_SPEED_LIMIT = 0.03
"""AdamW peak rates above this diverge for every transformer size we know of; warned about, not refused."""


class TrainingStageOptions(StageOptions, TrainOptions):
    """Fields every training stage has: resources, inputs, and how to train."""

    restarts: int = runtime(3, "how often failed workers are started again before the stage fails", ge=0)
    restart_backoff: float = runtime(
        1.0, "seconds before a restart that follows a start without one step; doubles each time, at most 60", ge=0
    )
    workers_timeout: float = runtime(
        600.0, "seconds to wait for the fewest workers on a cluster before the stage fails", gt=0
    )

    def training(self) -> TrainOptions:
        """The part the training core reads."""
        return TrainOptions(**{name: getattr(self, name) for name in TrainOptions.model_fields})


def model_place(value: Artifact | Files, name: str) -> tuple[Artifact, str] | str:
    """Where a model input's folder is: inside an artifact, or the folder that holds `config.json`.

    Raises:
        DataError: the files hold no `config.json`, or the artifact is an adapter alone.
    """
    if isinstance(value, Artifact):
        if value.manifest.counts.get("adapter_only"):
            raise DataError(
                "the stage left learned vectors, which are no part of a model's weights",
                place=f"inputs.{name}",
                mend="train lora or ia3 there, or load its adapter/ with PEFT",
            )
        return value, "model"
    for ref in value.refs:
        if PurePosixPath(ref.uri).name == "config.json":
            return ref.uri.rsplit("/", 1)[0]
    raise DataError(
        "the files are not a model folder: there is no config.json",
        place=f"inputs.{name}",
        mend="give the folder that save_pretrained wrote, as path/*",
    )


def model_config(value: Artifact | Files | None, name: str) -> Config | None:
    """The configuration of a model input that exists already; None when it does not yet."""
    if value is None:
        return None
    place = model_place(value, name)
    folder = place if isinstance(place, str) else place[0].join(place[1])
    config: Config = json.loads(read_bytes(join(folder, "config.json")))
    return config


def known_model(ctx: PlanContext[Any], name: str = "model") -> Config | None:
    """The configuration of a model input: of what exists already, or of what the stage before will leave."""
    foreseen = ctx.models.get(name)
    return model_config(ctx.inputs.get(name), name) or (None if foreseen is None else dict(foreseen))


def planned_config(options: ModelOptions, vocab_size: int) -> Config:
    """The configuration a model will be built with, defaults of its architecture included."""
    settings = options.settings()
    settings.setdefault("vocab_size", vocab_size)
    if options.config is None:
        return settings
    from modelyard.models.build import build_config

    return dict(build_config(options, min(vocab_size, settings["vocab_size"])).to_dict())


def check_training(
    options: TrainingStageOptions, config: Config | None, sequence_length: int | None, vocab_size: int | None
) -> None:
    """Refuses what cannot work, as far as it is known.

    Raises:
        ResourceError: the mesh or the global batch does not fit the number of workers, or all of a range; or flex
            attention is asked for without a GPU.
        RecipeError: heads do not divide the width, sequences are longer than the model's, or the layout does not
            divide heads, layers, experts or sequences.
        DataError: the tokens' vocabulary does not fit the model.
    """
    _check_elastic(options)
    if options.attention == "flex" and not options.resources.gpus_per_worker:
        raise ResourceError(
            "flex attention trains on CUDA only, and the workers ask for no GPU",
            place="attention",
            mend="set resources.gpus_per_worker, or use attention: sdpa",
        )
    check_layout(options, options.resources.workers)
    if config is None:
        return
    _check_heads(config)
    check_layout(options, options.resources.workers, config, sequence_length)
    longest = config.get("max_position_embeddings") or config.get("n_positions")
    if sequence_length and longest and sequence_length > longest:
        raise RecipeError(
            f"sequences of {sequence_length:,} tokens are longer than the model's {longest:,}",
            place="model.max_position_embeddings",
            mend="use a shorter sequence_length, or raise model.max_position_embeddings",
        )
    rows = config.get("vocab_size")
    if vocab_size and rows and rows < vocab_size:
        raise DataError(
            f"the tokens have a vocabulary of {vocab_size:,}, the model's embedding has {rows:,} rows",
            place="model.vocab_size",
            mend="leave model.vocab_size out, or tokenize with the model's own tokenizer",
        )


def _check_elastic(options: TrainingStageOptions) -> None:
    """A mesh with a fixed degree does not fit every number of workers of a range."""
    p = options.parallel
    fixed = p.shard is not None or any(n > 1 for n in (p.data, p.tensor, p.pipeline, p.context, p.expert))
    if options.resources.min_workers is not None and fixed:
        raise ResourceError(
            "an elastic number of workers leaves the degrees of the mesh open, but parallel fixes them",
            place="parallel",
            mend="leave the degrees out (the workers then shard), or give one number of workers",
        )


def _check_heads(config: Config) -> None:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if hidden and heads and not config.get("head_dim") and hidden % heads:
        raise RecipeError(
            f"{heads} attention heads do not divide hidden_size {hidden}",
            place="model.num_attention_heads",
            mend=f"choose a divisor of {hidden}",
        )
    size = config.get("head_dim") or (hidden // heads if hidden and heads else 0)
    if size % 2 and config.get("rope_parameters"):
        raise RecipeError(
            f"heads of {size} channels cannot be rotated: rotary positions turn pairs of channels",
            place="model.num_attention_heads",
            mend="choose hidden_size and num_attention_heads whose quotient is even",
        )
    shared = config.get("num_key_value_heads")
    if heads and shared and heads % shared:
        raise RecipeError(
            f"{shared} key-value heads do not divide {heads} attention heads",
            place="model.num_key_value_heads",
            mend=f"choose a divisor of {heads}",
        )


def warnings(options: TrainOptions) -> tuple[str, ...]:
    """What is allowed but looks like a mistake."""
    found = []
    if options.learning_rate > _SPEED_LIMIT:
        found.append(f"learning_rate {options.learning_rate:g} is far above what AdamW bears (1e-4 to 1e-2)")
    if options.learning_rate < 1e-7:
        found.append(f"learning_rate {options.learning_rate:g} is so low that nothing will be learnt")
    if options.clip is None and options.warmup == 0:
        found.append("neither clipping nor warm-up: the first steps may diverge")
    return tuple(found)


def predict(
    options: TrainingStageOptions,
    config: Config,
    tokens: float,
    sequence_length: int,
    adapter: AdapterOptions | None = None,
    root: str | None = None,
) -> Estimate:
    """Parameters, FLOPs, memory a worker and time, by the planner, with what looks like a mistake as notes.

    Without an `adapter` every parameter is trained. With a `root` that `modelyard calibrate` has been run on, by its
    own measured speeds.

    Raises:
        ResourceError: the memory predicted is above what a worker has; names the knob to turn.
    """
    from modelyard.planner.training import estimate_training
    from modelyard.stages.calibration import calibrated

    resources: Resources = options.resources
    layout = plan_layout(options, resources.workers)
    parts = micro_batches(options, degrees(options.parallel, resources.workers))
    estimate = estimate_training(
        config,
        tokens,
        sequence_length,
        # The planner cuts evenly; the loop also takes a batch that does not divide.
        layout.micro_batch * parts * layout.data,
        resources.workers,
        calibrated(root, resources.hardware, resources.cpus_per_worker),
        layout=layout,
        precision_name=planned_precision(options),
        trainable=None if adapter is None else trainable_parameters(config, adapter),
        frozen_bits=None if adapter is None else adapter.frozen_bits,
        cores_per_worker=resources.cpus_per_worker,
        memory_limit=resources.memory_per_worker,
        fused_loss=True,
    )
    return _with_notes(estimate, warnings(options))


def planned_precision(options: TrainingStageOptions) -> str:
    """The precision of training in the planner's words."""
    from modelyard.planner.hardware import find_hardware

    resources = options.resources
    gpu = bool(resources.gpus_per_worker) or find_hardware(resources.hardware).kind != "cpu"
    return "mixed" if options.precision == "bf16" or (options.precision == "auto" and gpu) else "fp32"


def planned_device(options: StageOptions, root: str | None, cores: float | None = None) -> Hardware:
    """The device of one worker as predictions take it; with `cores` that of an actor of so many."""
    from modelyard.planner.training import worker_hardware
    from modelyard.stages.calibration import calibrated

    cores = cores or options.resources.cpus_per_worker
    return worker_hardware(calibrated(root, options.resources.hardware, cores), cores)


def foreseen(
    options: TrainingStageOptions,
    config: Config,
    sequences: int | None,
    length: int,
    adapter: AdapterOptions | None = None,
    root: str | None = None,
) -> Estimate:
    """`predict` before the data have been packed.

    Args:
        options: how to train.
        config: of the model.
        sequences: training sequences as guessed from the data's bytes; None = the data are not there yet.
        length: tokens of a sequence.
        adapter: see `predict`.
        root: see `predict`.

    Raises:
        ResourceError: as `predict`.
    """
    counted = options.steps is not None or options.tokens is not None
    steps = options.total_steps(sequences or 1, length) if counted or sequences else 1
    estimate = predict(options, config, steps * options.global_batch * length, length, adapter, root)
    if counted:
        return estimate
    if sequences:
        return _with_notes(estimate, (f"about {steps:,} steps, guessed from the bytes of the data",))
    return one_step(estimate, "how many there are is known once the data are there")


def one_step(estimate: Estimate, unknown: str) -> Estimate:
    """What is known where the number of steps is not: `estimate`, which is of one step, without totals."""
    from dataclasses import replace

    from modelyard.planner import formatting as fmt

    note = f"a step takes {fmt.duration(estimate.seconds)}; {unknown}"
    return replace(
        estimate, tokens=None, flops=None, seconds=None, cost_usd=None, energy_kwh=None, basis=None,
        notes=(*estimate.notes, note),
    )  # fmt: skip


def predicted(
    options: TrainingStageOptions,
    config: Config | None,
    tokens: float,
    length: int,
    adapter: AdapterOptions | None = None,
    root: str | None = None,
) -> Estimate | None:
    """The same for a run that begins now; None where the planner has no answer: `plan` refuses what does not fit."""
    if config is None:
        return None
    try:
        return predict(options, config, tokens, length, adapter, root)
    except ModelyardError:
        return None


def _with_notes(estimate: Estimate, notes: Sequence[str]) -> Estimate:
    from dataclasses import replace

    return replace(estimate, notes=(*estimate.notes, *notes))


def lora_parameters(config: Config, rank: int) -> int:
    """About how many parameters rank-`rank` adapters on all linear layers of the blocks have."""
    from modelyard.planner.architecture import parse

    ends = 0
    for layer in parse(config).layers:
        query, shared = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
        attention = 2 * (layer.hidden + query) + 2 * (layer.hidden + shared)
        ends += layer.count * (attention + layer.matrices * (layer.hidden + layer.ffn_width))
    return rank * ends


def prompt_parameters(config: Config, options: PromptOptions) -> int:
    """How many parameters learned vectors have: those of p_tuning with the network that makes them."""
    from modelyard.planner.architecture import parse

    layers = parse(config).layers
    if options.kind == "prefix":
        return options.tokens * sum(2 * layer.count * layer.kv_heads * layer.head_dim for layer in layers)
    width = layers[0].hidden
    network = options.hidden * (2 * width + options.hidden + 2) + width if options.kind == "p_tuning" else 0
    return options.tokens * width + network


def trainable_parameters(config: Config, adapter: AdapterOptions) -> int | None:
    """About how many parameters an adapter trains; None = all of the model."""
    if adapter.lora is not None:
        return lora_parameters(config, adapter.lora.r)
    if adapter.prompt is not None:
        return prompt_parameters(config, adapter.prompt)
    return lora_parameters(config, 1) // 2 if adapter.ia3 is not None else None


def speed_metrics(outcome: Outcome) -> dict[str, float]:
    """What a run's speed and memory came to: what predictions are compared with and calibrated from."""
    figures = {"tokens_per_second": outcome.tokens_per_second, "train_seconds": outcome.seconds}
    # The first step of a process builds kernels and buffers; it says nothing about the others.
    steps = [row["seconds"] for row in outcome.history[1:] if "seconds" in row]
    if steps:
        figures["step_seconds"] = statistics.median(steps)
    if outcome.peak_bytes:
        figures["peak_memory_bytes"] = float(outcome.peak_bytes)
    return figures


def clear(ctx: StageContext[Any], *names: str) -> None:
    """Removes what an interrupted try left in the output."""
    from modelyard.storage import remove

    for name in names:
        if exists(join(ctx.output, name)):
            remove(join(ctx.output, name))
