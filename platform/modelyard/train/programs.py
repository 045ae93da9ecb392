"""Whole training jobs: what to build, on what data, where to save. Run by Ray Train workers, torchrun or a test.

A job is plain data (local paths and option models), so that any launcher can hand it to its processes. Every process
calls the program with its `World`; rank 0 reports through `sink` and `say` and writes the model.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import Field
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from modelyard import storage
from modelyard.errors import DataError, RecipeError
from modelyard.models.adapters import Task, add_adapter, merge_adapter, save_adapter
from modelyard.models.build import build_config, build_on_meta, check_shape
from modelyard.models.embeddings import extend_embeddings
from modelyard.models.export import copy_tokenizer, export_model, load_model, read_config
from modelyard.models.options import AdapterOptions, ModelOptions
from modelyard.models.packing import check_documents_apart
from modelyard.models.vocabulary import folder_extends
from modelyard.models.warm_start import TakenOver, take_over
from modelyard.recipe.schema import Options
from modelyard.tokens import TokenDataset, open_in_place
from modelyard.train.checkpoint import Checkpoints, Keep
from modelyard.train.choose_objective import choose_objective, objective_name
from modelyard.train.data import Batches, Sequences
from modelyard.train.denoise import check_sentinels
from modelyard.train.heldout import Heldout
from modelyard.train.hooks import Chain, Hooks
from modelyard.train.loop import Additions, Job, Outcome, fit
from modelyard.train.memory import memory_named
from modelyard.train.method_options import DenoisingOptions, RoutingOptions
from modelyard.train.metrics import Say, Sink, no_say, no_sink
from modelyard.train.noise import add_noise
from modelyard.train.objective import Objective
from modelyard.train.optimizer import make_optimizer
from modelyard.train.options import TrainOptions
from modelyard.train.pairs import PackedPairs
from modelyard.train.parallel.parallelize import parallelize
from modelyard.train.parallel.routing import routers
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.profile import Profiler
from modelyard.train.samples import Sampler, writes_text
from modelyard.train.token_folders import open_tokens
from modelyard.train.watchdog import Watchdog
from modelyard.train.world import World


class PretrainJob(Options):
    """Causal language modelling on token shards, from fresh weights (`model`) or a model folder (`start`).

    Both: `model` is built, and takes over from `start` what fits by name and shape.
    """

    tokens: str = Field(description="local folder with train/, heldout/ and tokenizer/")
    more: dict[str, str] = Field(
        {}, description="further such folders by name; each is a source then, that above under the name `tokens`"
    )
    output: str = Field(description="URI of the model folder to write")
    train: TrainOptions = Field(description="how to train")
    stream: str | None = Field(
        None, description="URI of the folder of training sequences, to read them where they lie; null = tokens/train"
    )
    model: ModelOptions | None = Field(None, description="the model to build; null = continue start as it is")
    start: str | None = Field(None, description="local model folder to start from; null = fresh weights")
    checkpoints: str | None = Field(None, description="URI for checkpoints; null = none")
    reports: str | None = Field(
        None, description="URI of a folder for profiles, samples of text and the stacks of a hang; null = none"
    )


class FinetuneJob(Options):
    """Supervised fine-tuning of a model folder on packed pairs."""

    model: str = Field(description="local model folder, with tokenizer")
    data: str = Field(description="local folder with packed pairs: train.npz, and heldout.npz where there are any")
    output: str = Field(description="URI of the folder to write model/ and adapter/ into")
    train: TrainOptions = Field(description="how to train")
    adapter: AdapterOptions = Field(AdapterOptions(lora=None), description="what is trained; `lora: null` = all")
    neftune: float = Field(0.0, ge=0, description="noise on the embeddings of training tokens (NEFTune); 0 = none")
    new_tokens: tuple[int, int] | None = Field(
        None,
        description="first and behind the last of the ids that the tokenizer in data's tokenizer/ adds; null = none",
    )
    checkpoints: str | None = Field(None, description="URI for checkpoints; null = none")
    reports: str | None = Field(
        None, description="URI of a folder for profiles, samples of text and the stacks of a hang; null = none"
    )


Stream = Callable[[TokenDataset, TrainOptions, Strategy], Callable[[int], Batches]]
"""From the sequences, the options and the layout to what makes the batches from a step on."""


def pretrain(
    job: PretrainJob,
    world: World,
    sink: Sink = no_sink,
    say: Say = no_say,
    hooks: Hooks | None = None,
    stream: Stream | None = None,
) -> Outcome:
    """Pre-trains and writes the model folder. `hooks` are called by the loop beside those the options ask for; `stream`
    reads the batches, None = a thread of this worker.

    Raises:
        DataError: tokens are missing or damaged, or do not fit the model.
        RecipeError: the model's configuration is wrong.
        ResourceError: mesh or batch does not fit the number of workers.
        DivergedError: losses stopped being numbers.
    """
    folder = Path(job.tokens)
    # Every worker checks sizes, one compares checksums.
    train, heldout = open_sides(job, verify=world.leads)
    strategy, config = pretraining_model(job, train, world, say)
    objective = choose_objective(job.train, "causal_lm")
    if job.train.objective == "span_corruption":
        denoising = job.train.denoising or DenoisingOptions()
        check_sentinels(config.vocab_size, train.vocab_size, denoising, train.sequence_length)
    identity = f"{architecture(config)}, {objective_name(objective)}"
    additions = Additions(stream(train, job.train, strategy) if stream is not None else None)
    setup = Setup(
        job.train, objective, identity, job.checkpoints, train.sequence_length, job.reports, folder / "tokenizer",
        additions,
    )  # fmt: skip
    outcome = run_loop(setup, strategy, train, heldout, sink, say, hooks)
    state = strategy.full_state()
    if world.leads:
        with written(job.output) as target:
            export_model(config, state, target, folder / "tokenizer")
    world.barrier()
    return outcome


def finetune(
    job: FinetuneJob, world: World, sink: Sink = no_sink, say: Say = no_say, hooks: Hooks | None = None
) -> Outcome:
    """Fine-tunes and writes `model/` (merged) and, with an adapter, `adapter/`; an adapter of learned vectors alone.

    Raises as :func:`pretrain`.
    """
    source = Path(job.model)
    data, heldout = packed_pairs(Path(job.data))
    plain = load_model(source)
    check_shape(plain.config, data.longest + (job.adapter.prompt.tokens if job.adapter.prompt else 0))
    config, words, rows = read_config(source), source, range(*job.new_tokens) if job.new_tokens is not None else None
    if rows is not None:
        words, added = Path(job.data) / "tokenizer", extend_embeddings(plain, rows.stop, rows.start)
        config.vocab_size = plain.config.vocab_size
        if world.leads:
            say(f"{added:,} rows of the embeddings begin as the mean of the others")
    objective = choose_objective(job.train, "completion_lm")
    strategy = adapted(plain, job.adapter, job.train, world, rows=rows)
    if job.neftune:
        add_noise(strategy.model, job.neftune)
    identity = identify(config, objective, job.adapter)
    setup = Setup(job.train, objective, identity, job.checkpoints, data.sequence_length, job.reports, words)
    outcome = run_loop(setup, strategy, data, heldout, sink, say, hooks)
    state = strategy.full_state(trainable_only=not job.adapter.full)
    if world.leads:
        with written(job.output) as target:
            write_tuned(source, job.adapter, job.train.seed, config, state, target, words, rows)
    world.barrier()
    return outcome


def packed_pairs(folder: Path) -> tuple[PackedPairs, PackedPairs | None]:
    """Training and held-out sequences of a folder with `train.npz` and perhaps `heldout.npz`."""
    held = folder / "heldout.npz"
    return PackedPairs.load(folder / "train.npz"), PackedPairs.load(held) if held.exists() else None


def adapted(
    plain: PreTrainedModel,
    adapter: AdapterOptions,
    options: TrainOptions,
    world: World,
    task: Task = "CAUSAL_LM",
    more: Mapping[str, nn.Module] | None = None,
    rows: range | None = None,
) -> Strategy:
    """The model with its adapter, where there is one, `more` modules by name and trained `rows` of the embeddings,
    parallelised and on its device.

    Raises:
        RecipeError: several documents in a row would see each other.
    """
    if adapter.prompt is None:  # rows hold one document where learned vectors stand before it
        check_documents_apart(plain)
    model = plain if adapter.full else add_adapter(plain, adapter, options.seed, task, rows)
    for name, module in (more or {}).items():
        model.add_module(name, module)
    return parallelize(model.to(world.device), options, world)


def identify(config: PretrainedConfig, objective: Objective, adapter: AdapterOptions) -> str:
    """What checkpoints of a tuned model must agree with."""
    return f"{architecture(config)}, {objective_name(objective)}, {adapter.model_dump(exclude_none=True) or 'full'}"


@dataclass(frozen=True)
class Setup:
    """What the programs do differently around the same loop."""

    options: TrainOptions
    objective: Objective
    identity: str
    checkpoints: str | None
    sequence_length: int
    reports: str | None
    tokenizer: Path
    additions: Additions = field(default_factory=Additions)


def run_loop(
    setup: Setup,
    strategy: Strategy,
    data: Sequences,
    heldout: Sequences | None,
    sink: Sink,
    say: Say,
    hooks: Hooks | None,
) -> Outcome:
    """The loop with checkpoints, held-out losses, samples and watches as the options ask for them."""
    options, objective, model, world = setup.options, setup.objective, strategy.model, strategy.world
    keeper = None
    if setup.checkpoints:
        keep = Keep(options.keep_checkpoints, options.keep_best, options.keep_every)
        keeper = Checkpoints(setup.checkpoints, setup.identity, world, keep, say, options.async_checkpoints)
    evaluate = None
    if heldout is not None:
        evaluate = Heldout(strategy, objective, heldout, options.micro_batch or 16)
    optimizer = make_optimizer(model, options)
    job = Job(model, optimizer, objective, data, setup.sequence_length, options, keeper, evaluate, sink, say, strategy)
    job.hooks = _hooks(setup, world, say, hooks)
    job.additions = setup.additions
    if options.samples is not None and setup.reports is not None and writes_text(strategy, say):
        job.sample = Sampler(model, setup.tokenizer, options.samples, world, setup.reports)
    with memory_named(world.device):
        outcome = fit(job, world)
    return replace(outcome, by_source=evaluate.by_source if evaluate is not None else {})


def _hooks(setup: Setup, world: World, say: Say, outer: Hooks | None) -> Hooks:
    """What the options ask for: a watch over steps, a profile; and what the caller adds."""
    options, found = setup.options, [outer] if outer is not None else []
    if options.step_timeout:
        found.append(Watchdog(options.step_timeout, world.rank, setup.reports, say))
    if options.profile is not None and setup.reports is not None:
        found.append(Profiler(options.profile, world, setup.reports, say))
    return Chain(found)


def open_sides(job: PretrainJob, *, verify: bool) -> tuple[TokenDataset, TokenDataset | None]:
    """The job's sequences to train on, and those held out, if any. Raises as :func:`open_tokens`."""
    folders = {"tokens": Path(job.tokens), **{name: Path(place) for name, place in job.more.items()}}
    if job.stream is not None:
        return open_in_place(job.stream), open_tokens(folders, "heldout", verify=verify)
    train = open_tokens(folders, "train", verify=verify)
    assert train is not None
    return train, open_tokens(folders, "heldout", verify=verify)


def pretraining_model(
    job: PretrainJob, data: TokenDataset, world: World, say: Say = no_say
) -> tuple[Strategy, PretrainedConfig]:
    """The job's model, initialised or loaded, parallelised and on its device; and its configuration.

    Raises:
        RecipeError: neither a model to build nor one to start from is given, or it cannot be built.
        DataError: the model does not fit the tokens, or nothing of `start` fits the model.
    """
    if job.model is None:
        return _continued(job, data, world, say)
    config = build_config(job.model, data.vocab_size, data.sequence_length)
    model = build_on_meta(config)
    strategy = parallelize(model, _routed(job.train, model), world)
    strategy.materialise(job.train.seed)
    if job.start is not None:
        _warm(strategy, Path(job.start), world, say)
    return strategy, config


def _continued(job: PretrainJob, data: TokenDataset, world: World, say: Say) -> tuple[Strategy, PretrainedConfig]:
    """The model of `start` as it is, with more rows where the tokens' vocabulary extends its own."""
    if job.start is None:
        raise RecipeError("nothing to train", mend="give model (preset or config) or an input model to start from")
    start = Path(job.start)
    loaded = load_model(start)
    if data.vocab_size > loaded.config.vocab_size:
        _check_extends(start, Path(job.tokens), data, loaded.config.vocab_size)
        added = extend_embeddings(loaded, data.vocab_size)
        if world.leads:
            say(f"{added:,} rows added to the embeddings, as the mean of the others")
    check_shape(loaded.config, data.sequence_length)
    options = _routed(job.train, loaded)
    return parallelize(cast(nn.Module, loaded).to(world.device), options, world), loaded.config


def _warm(strategy: Strategy, start: Path, world: World, say: Say) -> None:
    found = take_over(dict(strategy.model.named_parameters()), load_model(start))
    everyone: list[TakenOver] = world.gather(found)
    if not any(part.taken for part in everyone):
        raise DataError(f"nothing of it fits the model: {found}", place=str(start), mend="give a model of the family")
    if world.leads:
        say(f"warm start: {found}")


def _check_extends(start: Path, tokens: Path, data: TokenDataset, rows: int) -> None:
    """Raises DataError where the tokens name ids that the model does not have and their tokenizer is another one."""
    if folder_extends(str(tokens / "tokenizer"), str(start)):
        return
    raise DataError(
        f"the tokens have a vocabulary of {data.vocab_size:,}, the model has {rows:,} rows, "
        "and their tokenizer is not an extension of the model's",
        place=str(data.folder),
        mend="tokenize with the model's own tokenizer (tokenizer: {path: ...}, add: [...] for more tokens)",
    )


def _routed(options: TrainOptions, model: nn.Module) -> TrainOptions:
    """With the usual losses of routers where the model has such and the options say nothing."""
    if options.routing is not None or not routers(model):
        return options
    return options.model_copy(update={"routing": RoutingOptions()})


def architecture(config: PretrainedConfig) -> str:
    """What a checkpoint must agree with: the model's type and widths, short enough to print."""
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    sizes = " ".join(f"{name}={getattr(config, name)}" for name in names if hasattr(config, name))
    return f"{config.model_type} {sizes}"


def write_tuned(
    source: Path,
    adapter: AdapterOptions,
    seed: int,
    config: PretrainedConfig,
    state: dict[str, torch.Tensor],
    target: Path,
    tokenizer: Path | None = None,
    rows: range | None = None,
) -> None:
    """Rebuilds the plain model on this CPU, puts the trained adapter in, saves it apart and, where it can be, merged.

    `rows` are those of new tokens; `tokenizer` is a folder, None = the source's.

    Raises:
        DataError: the trained weights are of another model.
    """
    tokenizer = tokenizer or source
    if adapter.full:
        export_model(config, state, target / "model", tokenizer)
        return
    plain = load_model(source)
    if rows is not None:
        extend_embeddings(plain, rows.stop, rows.start)
    model = add_adapter(plain, adapter, seed, rows=rows)
    unknown = model.load_state_dict(state, strict=False).unexpected_keys
    if unknown:
        raise DataError(f"the adapter's weights do not fit the model: {unknown[0]}", place=str(source))
    save_adapter(model, target / "adapter")
    forget_base(target / "adapter")
    copy_tokenizer(tokenizer, target / "adapter")
    if adapter.prompt is not None:
        return
    merged = merge_adapter(model)
    export_model(config, cast(dict[str, torch.Tensor], dict(merged.named_parameters())), target / "model", tokenizer)


def forget_base(folder: Path) -> None:
    """The base model's path is this machine's: a reader of the adapter elsewhere must not follow it.

    PEFT's README, an empty model card, names it too, and goes.
    """
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    described: dict[str, Any] = json.loads(settings.read_text(encoding="utf-8"))
    described["base_model_name_or_path"] = None
    settings.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


@contextmanager
def written(uri: str) -> Iterator[Path]:
    """A local folder whose content ends up below `uri`, over whatever an interrupted try left there."""
    with tempfile.TemporaryDirectory(prefix="modelyard-model-") as folder:
        yield Path(folder)
        for child in Path(folder).iterdir():
            storage.remove(storage.join(uri, child.name))
        if storage.is_remote(uri):
            storage.upload(folder, uri)
        else:
            shutil.copytree(folder, storage.filesystem(uri)[1], dirs_exist_ok=True)
