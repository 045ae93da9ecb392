"""Stage `tokenize`: one or several curated corpora become a tokenizer and packed token shards.

Each input is a source under the name it is given: its documents are packed apart from the others', and the
index says which sequences are its own.

Ray Data maps work units (row groups of the corpus, then buckets of documents) over worker
processes. A unit's result is written under the stage's scratch folder, so a rerun after a crash
does only what is missing; units are fixed by the corpus, never by Ray's blocks or workers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from modelyard.errors import DataError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import NAME, Resources, StageOptions
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.remote import blocks, plain_errors, quiet_ray_data
from modelyard.storage import Artifact, download, exists, is_remote, join, list_files, remove, upload, write_bytes
from modelyard.tokens.options import TokenizerOptions, TrainTokenizerOptions

if TYPE_CHECKING:
    import pyarrow as pa

    from modelyard.tokens.shards import Index
    from modelyard.tokens.tokenizer import Encoder
    from modelyard.tokens.units import Layout, Packed, Unit

BYTES_PER_TOKEN = 3.8
"""Documentation and code at a vocabulary of 8,192; for predictions only."""
_SECONDS_PER_BYTE = 0.5e-6


class TokenizeOptions(StageOptions):
    """Trains or opens a tokenizer and packs corpora into fixed-length sequences, each input a source."""

    kind: Literal["tokenize"] = Field(description="stage kind")
    tokenizer: TokenizerOptions = Field(
        TokenizerOptions(train=TrainTokenizerOptions()), description="where the tokenizer comes from"
    )
    sequence_length: int = Field(1024, ge=2, le=1 << 20, description="tokens in a sequence; default: GPT-2's context")
    heldout: float = Field(
        0.01, gt=0, lt=1, description="share of documents held out for evaluation, by a hash of their id; own choice"
    )

    @model_validator(mode="after")
    def _source_names(self) -> TokenizeOptions:
        for name in self.inputs:
            if not NAME.match(name):
                raise ValueError(f"input {name!r} names a source: use lower-case letters, digits, - and _, at most 48")
        return self


class TokenizeStage(Stage[TokenizeOptions]):
    """See the module."""

    kind = "tokenize"
    version = 2
    Options = TokenizeOptions
    more = InputSpec(kinds=("curate",))

    def check(self, ctx: PlanContext[TokenizeOptions]) -> None:
        """Raises DataError when a corpus is already known to hold no documents."""
        for corpus in ctx.inputs.values():
            if isinstance(corpus, Artifact) and not corpus.manifest.counts.get("documents", 1):
                mend = "give more input or looser rules"
                raise DataError("the corpus holds no documents", place=corpus.uri, mend=mend)

    def estimate(self, ctx: PlanContext[TokenizeOptions]) -> Estimate:
        """Tokens from the corpus' bytes; time at 2 MB of text a core-second for training and for encoding."""
        corpora = [value for value in ctx.inputs.values() if isinstance(value, Artifact)]
        if not corpora or len(corpora) < len(ctx.options.inputs):
            return Estimate(notes=("tokens are known once the corpora are",))
        size = sum(corpus.manifest.counts["bytes"] for corpus in corpora)
        resources, train = ctx.options.resources, ctx.options.tokenizer.train
        sample = min(size, train.sample_bytes) if train else 0
        cores = resources.cpus_per_worker
        seconds = 10 + _SECONDS_PER_BYTE * (sample / cores + size / (cores * resources.workers))
        return Estimate(tokens=int(size / BYTES_PER_TOKEN), seconds=seconds)

    def run(self, ctx: StageContext[TokenizeOptions]) -> StageResult:
        """Trains the tokenizer, encodes, packs, and describes the result in tokens.json."""
        from modelyard.tokens.pack import Buckets
        from modelyard.tokens.units import Layout, plan_units

        # Sorted: the order of a mapping's keys decides no result.
        corpora = {name: ctx.artifact(name) for name in sorted(ctx.inputs)}
        sizes = {name: corpus.manifest.counts["bytes"] for name, corpus in corpora.items()}
        units = [u for name, corpus in corpora.items() for u in plan_units(corpus.join("data"), sizes[name], name)]
        buckets = {name: Buckets.plan(size, ctx.options.heldout) for name, size in sizes.items()}
        layout = Layout(ctx.work, ctx.output, buckets, ctx.options.sequence_length)
        with plain_errors():
            tokenizer = _tokenizer(ctx, units, sum(sizes.values()))
            _encode(ctx, units, tokenizer, layout)
            packed = _pack(ctx, units, tokenizer, layout)
        return _finish(ctx, tokenizer, layout, packed)


def _tokenizer(ctx: StageContext[TokenizeOptions], units: list[Unit], size: int) -> str:
    """The URI of the tokenizer folder in the scratch folder; made unless an earlier try has made it."""
    from modelyard.tokens.tokenizer import copy_tokenizer, extend_tokenizer

    folder, done = join(ctx.work, "tokenizer"), join(ctx.work, "tokenizer.done")
    if exists(done):
        return folder
    options = ctx.options.tokenizer
    if options.path is not None:
        with TemporaryDirectory() as local:
            copy_tokenizer(options.path, local)
            upload(local, folder)
    elif options.train is not None:
        _train(ctx, options.train, units, size, folder)
    if options.add or options.add_special:
        with TemporaryDirectory() as local:
            added = extend_tokenizer(download(folder, local), options.add, options.add_special)
            upload(local, folder)
        ctx.progress.say(f"{added:,} tokens added to the vocabulary")
    write_bytes(done, b"")
    return folder


def _train(
    ctx: StageContext[TokenizeOptions], options: TrainTokenizerOptions, units: list[Unit], size: int, folder: str
) -> None:
    import ray

    resources, heldout = ctx.options.resources, ctx.options.heldout
    # The sample comes from the documents for training alone, about size * (1 - heldout) bytes.
    share = min(1.0, options.sample_bytes / max(1.0, size * (1 - heldout)))
    sampled = share * size * (1 - heldout) / 1e6
    ctx.progress.say(f"training a tokenizer of {options.vocab_size:,} entries on {sampled:,.1f} MB of text")
    sample = _map(_unit_rows(units), partial(_sample_unit, share=share, heldout=heldout), resources)
    train = ray.remote(num_cpus=resources.cpus_per_worker, max_retries=1)(_train_tokenizer)
    ray.get(train.remote(sample.to_arrow_refs(), options.vocab_size, folder, resources.cpus_per_worker))


def _encode(ctx: StageContext[TokenizeOptions], units: list[Unit], tokenizer: str, layout: Layout) -> None:
    # One listing: a question per unit would take minutes on an object store.
    done = {name for name, _ in list_files(join(ctx.work, "encoded"))}
    todo = [unit for unit in units if f"{unit.key}.arrow" not in done]
    resources = ctx.options.resources
    work = partial(_encode_unit, tokenizer=tokenizer, layout=layout, cpus=resources.cpus_per_worker)
    with ctx.progress.task("encode", len(units), "units") as bar:
        bar.advance(len(units) - len(todo))
        tokens = 0
        for row in _map(_unit_rows(todo), work, resources).iter_rows() if todo else ():
            tokens += row["tokens"]
            bar.advance(1, tokens=tokens)


def _pack(ctx: StageContext[TokenizeOptions], units: list[Unit], tokenizer: str, layout: Layout) -> list[Packed]:
    import ray

    from modelyard.tokens.units import load_packed

    rows = [
        {"source": name, "bucket": bucket}
        for name, buckets in layout.buckets.items()
        for bucket in range(buckets.total)
    ]
    work = partial(_pack_bucket, units=ray.put(units), tokenizer=tokenizer, layout=layout)
    packed = []
    with ctx.progress.task("pack", len(rows), "shards") as bar:
        for row in _map(rows, work, ctx.options.resources).iter_rows():
            packed.append(load_packed(row["packed"]))
            bar.advance(1)
    return sorted(packed, key=lambda p: (p.source, p.bucket))


def _map(rows: list[dict[str, Any]], work: Callable[[pa.Table], pa.Table], resources: Resources) -> Any:
    """A Ray dataset that applies `work` to tables of one row each, on the stage's workers."""
    import ray

    quiet_ray_data()
    return ray.data.from_items(rows, override_num_blocks=blocks(len(rows), resources.workers)).map_batches(
        work,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.cpus_per_worker,
        concurrency=resources.workers,
    )


def _unit_rows(units: list[Unit]) -> list[dict[str, Any]]:
    return [asdict(unit) for unit in units]


def _unit(row: pa.Table) -> Unit:
    from modelyard.tokens.units import Unit

    return Unit(**row.to_pylist()[0])


def _sample_unit(row: pa.Table, share: float, heldout: float) -> pa.Table:
    from modelyard.tokens.units import sample_unit

    return sample_unit(_unit(row), share, heldout)


def _train_tokenizer(sample: list[Any], vocab_size: int, folder: str, cpus: float) -> None:
    """Runs on a worker: trains on the tables behind `sample` and writes the tokenizer folder."""
    import ray

    from modelyard.tokens.tokenizer import limit_threads, save_tokenizer, train_tokenizer

    limit_threads(cpus)
    texts = (text for ref in sample for text in ray.get(ref)["text"].to_pylist())
    with TemporaryDirectory() as local:
        save_tokenizer(train_tokenizer(texts, vocab_size), local)
        upload(local, folder)


def _encode_unit(row: pa.Table, tokenizer: str, layout: Layout, cpus: float) -> pa.Table:
    import pyarrow as pa

    from modelyard.tokens.tokenizer import limit_threads
    from modelyard.tokens.units import encode_unit

    limit_threads(cpus)
    return pa.table({"tokens": [encode_unit(_unit(row), _encoder(tokenizer), layout)]})


def _pack_bucket(row: pa.Table, units: Any, tokenizer: str, layout: Layout) -> pa.Table:
    import pyarrow as pa
    import ray

    from modelyard.tokens.units import dump_packed, pack_bucket

    source, bucket = row["source"][0].as_py(), row["bucket"][0].as_py()
    packed = pack_bucket(ray.get(units), source, bucket, _encoder(tokenizer), layout)
    return pa.table({"packed": [dump_packed(packed)]})


@lru_cache(maxsize=1)
def _encoder(folder: str) -> Encoder:
    from modelyard.tokens.tokenizer import Encoder

    if not is_remote(folder):
        return Encoder.open(folder)
    with TemporaryDirectory() as local:
        return Encoder.open(download(folder, local))


def _finish(ctx: StageContext[TokenizeOptions], tokenizer: str, layout: Layout, packed: list[Packed]) -> StageResult:
    """Checks that both sides of every source hold something, then writes indexes, tokenizer and tokens.json."""
    import numpy as np

    from modelyard.tokens.statistics import unigram_entropy

    encoder = _encoder(tokenizer)
    sides = {
        side: {name: [p for p in packed if p.source == name and own.split(p.bucket) == side]
               for name, own in layout.buckets.items()}
        for side in ("train", "heldout")
    }  # fmt: skip
    for side, sources in sides.items():
        for name, parts in sources.items():
            _require(side, name, parts, ctx.options)
    counts = {side: np.sum([p.counts for parts in own.values() for p in parts], axis=0) for side, own in sides.items()}
    _remove_leftovers(ctx.output, packed, layout)
    with TemporaryDirectory() as local:
        upload(download(tokenizer, local), join(ctx.output, "tokenizer"))
    length, size = ctx.options.sequence_length, encoder.vocab_size
    indexes = {side: _write_index(join(ctx.output, side), length, size, own) for side, own in sides.items()}
    facts = _facts(indexes, unigram_entropy(counts["train"], counts["heldout"]))
    write_bytes(join(ctx.output, "tokens.json"), (json.dumps(facts, indent=1) + "\n").encode())
    return _result(facts)


def _write_index(folder: str, sequence_length: int, vocab_size: int, parts: Mapping[str, list[Packed]]) -> Index:
    from modelyard.tokens.shards import describe_source, write_index

    shards = [p.shard for own in parts.values() for p in own if p.shard]
    sources = [
        describe_source(name, i, shards, sum(p.documents for p in own), sum(p.text_bytes for p in own))
        for i, (name, own) in enumerate(parts.items())
    ]
    return write_index(folder, sequence_length, vocab_size, shards, sources)


def _require(side: str, source: str, parts: list[Packed], options: TokenizeOptions) -> None:
    documents = sum(p.documents for p in parts)
    place = f"inputs.{source}, {side} side of the split"
    if not documents:
        mend = "give more documents, or a larger heldout share" if side == "heldout" else "give more documents"
        raise DataError(f"heldout {options.heldout:g} leaves no document there", place=place, mend=mend)
    if not any(p.shard for p in parts):
        mend = "give more text or a smaller sequence_length"
        raise DataError(
            f"{documents:,} documents fill no sequence of {options.sequence_length:,} tokens", place=place, mend=mend
        )


def _facts(indexes: Mapping[str, Index], entropy: float) -> dict[str, Any]:
    """The content of tokens.json."""
    one = indexes["train"]
    facts: dict[str, Any] = {
        "vocab_size": one.vocab_size, "sequence_length": one.sequence_length, "dtype": one.dtype,
    }  # fmt: skip
    for side, index in indexes.items():
        facts[f"{side}_tokens"] = index.tokens
        facts[f"{side}_sequences"] = index.sequences
        facts[f"{side}_documents"] = index.documents
        facts[f"{side}_bytes"] = index.text_bytes
    sources = {side: {s.name: s.model_dump(exclude={"name"}) for s in index.sources} for side, index in indexes.items()}
    return facts | {"unigram_entropy": entropy, "sources": sources}


def _remove_leftovers(output: str, packed: list[Packed], layout: Layout) -> None:
    """Removes what an interrupted try by other code may have left in the artifact's folder."""
    ours = {f"{layout.buckets[p.source].split(p.bucket)}/{p.shard.file}" for p in packed if p.shard}
    for name, _ in list(list_files(output)):
        if name not in ours:
            remove(join(output, name))


def _result(facts: Mapping[str, Any]) -> StageResult:
    counts = {key: value for key, value in facts.items() if isinstance(value, int)}
    per_token = facts["heldout_bytes"] / facts["heldout_tokens"]
    summary = (
        f"{facts['train_tokens']:,} tokens in {facts['train_sequences']:,} sequences of {facts['sequence_length']:,}, "
        f"{facts['heldout_tokens']:,} tokens of {facts['heldout_documents']:,} documents held out, "
        f"unigram entropy {facts['unigram_entropy']:.2f} nats"
    )
    return StageResult(summary, counts, {"unigram_entropy": facts["unigram_entropy"], "bytes_per_token": per_token})
