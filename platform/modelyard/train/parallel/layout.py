"""Which degrees of parallelism fit workers, model and batch. Light: `plan` asks before anything is started."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from modelyard.errors import RecipeError, ResourceError
from modelyard.planner.architecture import parse
from modelyard.planner.layout import Layout, nearest_divisor, validate
from modelyard.train.options import ParallelOptions, TrainOptions

AXES = ("pipeline", "data", "shard", "context", "expert", "tensor")
"""Mesh axes, outermost first: what talks most (tensor) lies on neighbouring workers, what talks least on far ones."""

PIPELINE_FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen2_moe", "qwen3_moe", "olmo2", "olmoe", "smollm3", "gpt2",
)  # fmt: skip
"""Families whose layers pass on hidden states alone, and whose output layer is the last thing that happens."""

WHOLE_FAMILIES = ("t5", "mt5", "bart", "bloom", "mpt")
"""Encoder-decoders and ALiBi models: their blocks exchange more than hidden states, so they are not cut."""


def degrees(options: ParallelOptions, workers: int) -> dict[str, int]:
    """Size of every mesh axis in the order of `AXES`.

    Raises:
        ResourceError: the product is not the number of workers; names the nearest one that is.
    """
    asked = {name: getattr(options, name) for name in AXES}
    rest = math.prod(size for name, size in asked.items() if name != "shard")
    asked["shard"] = options.shard or max(1, workers // rest)
    if math.prod(asked.values()) != workers:
        raise ResourceError(
            f"{label(asked)} is {math.prod(asked.values())}, but there are {workers} workers",
            place="parallel",
            mend=f"the nearest layout for {workers} workers is {label(nearest(asked, workers))}; "
            "or choose degrees whose product is resources.workers",
        )
    return asked


def label(sizes: Mapping[str, int]) -> str:
    """`shard 4 x tensor 2`; data and shard are named even where they are 1 and nothing else is split."""
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " x ".join(parts) or "data 1 x shard 1"


def nearest(asked: Mapping[str, int], workers: int) -> dict[str, int]:
    """The degrees with product `workers` that differ least from those asked for, in factors; unused axes stay 1."""
    names = [name for name, size in asked.items() if size > 1 or name == "shard"]

    def distance(found: tuple[int, ...]) -> tuple[float, int]:
        ratios = [abs(math.log2(size / asked[name])) for name, size in zip(names, found, strict=True)]
        return sum(ratios), sum(ratio > 0 for ratio in ratios)

    best = min(_factorisations(workers, len(names)), key=distance)
    return {**dict.fromkeys(asked, 1), **dict(zip(names, best, strict=True))}


def _factorisations(value: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (value,)
        return
    for first in (d for d in range(1, value + 1) if value % d == 0):
        for others in _factorisations(value // first, parts - 1):
            yield (first, *others)


def readers(sizes: Mapping[str, int]) -> int:
    """Workers that read different sequences: replicas, shards and expert groups."""
    return sizes["data"] * sizes["shard"] * sizes["expert"]


def plan_layout(options: TrainOptions, workers: int) -> Layout:
    """The same layout in the planner's words.

    Raises:
        ResourceError: the degrees do not multiply to the number of workers.
    """
    p, sizes = options.parallel, degrees(options.parallel, workers)
    shares = readers(sizes)
    share = math.ceil(options.global_batch / shares)
    micro = math.ceil(share / micro_batches(options, sizes))
    return Layout(
        data=shares,
        shard=sizes["shard"] * sizes["expert"],
        zero=0 if shares * sizes["context"] == sizes["data"] > 1 else 3 if p.reshard else 2,
        tensor=p.tensor,
        sequence_parallel=sequence_parallel(p),
        pipeline=p.pipeline,
        schedule=p.schedule,
        virtual=p.chunks if p.pipeline > 1 else 1,
        context=p.context,
        expert=p.expert,
        micro_batch=micro,
        recompute=options.recompute,
        sync_each=False,
        offload=p.offload,
    )


def sequence_parallel(options: ParallelOptions) -> bool:
    """Whether norms and residuals are split over the tensor axis."""
    return options.tensor > 1 and (options.sequence is None or bool(options.sequence))


def micro_batches(options: TrainOptions, sizes: Mapping[str, int]) -> int:
    """Forward passes a worker makes for one optimizer step; enough to fill a pipeline where there is one."""
    share = math.ceil(options.global_batch / readers(sizes))
    if options.micro_batch is not None or sizes["pipeline"] == 1:
        return math.ceil(share / (options.micro_batch or 16))
    # Four micro-batches a stage keep the bubble of 1F1B near a fifth.
    stages = sizes["pipeline"] * options.parallel.chunks
    return next(
        (n for n in range(min(share, 4 * stages), 0, -1) if share % n == 0 and n % sizes["pipeline"] == 0), share
    )


def check_layout(
    options: TrainOptions, workers: int, config: Mapping[str, Any] | None = None, sequence_length: int | None = None
) -> None:
    """Refuses what cannot be cut, before anything is built.

    Args:
        options: how to train.
        workers: how many there are.
        config: the model's configuration; None = not known yet.
        sequence_length: tokens a sequence; None = not known yet.

    Raises:
        ResourceError: the degrees do not multiply to the workers, or the batch is too small for them.
        RecipeError: heads, layers, experts or the sequence do not divide, or the model cannot be cut that way.
    """
    p, sizes = options.parallel, degrees(options.parallel, workers)
    _check_batch(options, sizes)
    _check_options(p)
    if options.compress is not None and sizes["data"] != workers:
        raise RecipeError(
            "compressed gradients are an exchange between replicas, but the layout splits the model",
            place="compress",
            mend=f"use parallel: {{data: {workers}}}, or leave compress out",
        )
    if options.attention == "flex" and sizes["context"] > 1:
        raise RecipeError(
            "context parallelism brings an attention of its own",
            place="attention",
            mend="use attention: sdpa, or parallel: {context: 1}",
        )
    if options.samples is not None and sizes["pipeline"] * sizes["context"] > 1:
        raise RecipeError(
            "text is sampled with a whole model on every worker",
            place="samples",
            mend="leave samples out, or use pipeline: 1 and context: 1",
        )
    if config is None or workers == 1:
        return
    kind = str(config.get("model_type"))
    if sizes["pipeline"] > 1 and kind not in PIPELINE_FAMILIES:
        raise RecipeError(
            f"models of type {kind} are not split into pipeline stages",
            place="parallel.pipeline",
            mend=f"use pipeline: 1, or one of {', '.join(PIPELINE_FAMILIES)}",
        )
    split = [name for name in ("tensor", "context") if sizes[name] > 1]
    if split and (kind in WHOLE_FAMILIES or config.get("is_encoder_decoder")):
        raise RecipeError(
            f"models of type {kind} are not split by {split[0]}",
            place=f"parallel.{split[0]}",
            mend="use data and shard, which split every model",
        )
    layout, length = plan_layout(options, workers), sequence_length or p.context * p.tensor
    validate(layout, parse(config), length, layout.data * layout.micro_batch)
    _check_heads(config, sizes)
    if sequence_parallel(p) and length // p.context % p.tensor:
        raise RecipeError(
            f"sequences of {length:,} tokens cannot be divided by context {p.context} x tensor {p.tensor}",
            place="parallel.sequence",
            mend="use sequence: false, or a sequence_length that divides",
        )


def _check_heads(config: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    heads = config.get("num_attention_heads") or config.get("n_head") or 1
    shared = config.get("num_key_value_heads") or heads
    over = sizes["tensor"] * sizes["context"]
    for count, what, degree, name in (
        (shared, "key-value heads", sizes["tensor"], "tensor"),
        (heads, "attention heads", over, "tensor x context"),
    ):
        if count % degree:
            raise RecipeError(
                f"{count} {what} cannot be divided by {name} {degree}",
                place="parallel",
                mend=f"the nearest {name} that divides {count} is {nearest_divisor(count, degree)}",
            )


def _check_batch(options: TrainOptions, sizes: Mapping[str, int]) -> None:
    shares = readers(sizes)
    if options.global_batch < shares:
        raise ResourceError(
            f"a global batch of {options.global_batch} sequences cannot feed {shares} workers",
            place="global_batch",
            mend=f"raise global_batch to at least {shares} or use fewer workers",
        )
    if sizes["pipeline"] == 1:
        return
    if options.batch_warmup is not None:
        raise RecipeError(
            "a batch that rises changes how many micro-batches fill the pipeline",
            place="batch_warmup",
            mend="use pipeline: 1 or a constant batch",
        )
    parts, p = micro_batches(options, sizes), options.parallel
    least = {"gpipe": 1, "1f1b": p.pipeline, "dualpipev": 2 * p.pipeline}.get(p.schedule, p.pipeline)
    if parts < least or (p.schedule in ("interleaved", "zero-bubble") and parts % p.pipeline):
        raise RecipeError(
            f"{parts} micro-batches a step do not fill a {p.schedule} pipeline of {p.pipeline} workers",
            place="micro_batch",
            mend=f"use a smaller micro_batch or a larger global_batch: a multiple of {p.pipeline} micro-batches, "
            f"at least {least}, for each of {shares} readers",
        )


def _check_options(p: ParallelOptions) -> None:
    if p.sequence is not None and not isinstance(p.sequence, bool) and p.sequence not in (0, 1, p.tensor):
        raise RecipeError(
            f"sequence {p.sequence} differs from tensor {p.tensor}",
            place="parallel.sequence",
            mend=f"sequence parallelism rides on the tensor axis: use true, false or {p.tensor}",
        )
    if p.pipeline > 1 and p.schedule in ("zbv", "dualpipev") and p.chunks != 2:
        raise RecipeError(f"{p.schedule} needs 2 chunks a worker", place="parallel.virtual", mend="use virtual: 2")
    if p.pipeline > 1 and p.schedule in ("gpipe", "1f1b") and p.chunks != 1:
        raise RecipeError(
            f"{p.schedule} runs one chunk a worker", place="parallel.virtual", mend="use schedule: interleaved"
        )
