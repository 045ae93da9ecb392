"""Stage `evaluate`: one model, or a model beside the one it came from, on held-out data and for privacy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from modelyard.errors import StorageError
from modelyard.evaluate.options import EvaluationOptions
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import StageOptions, runtime
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.remote import plain_errors
from modelyard.stages.training import model_config, model_place
from modelyard.storage import Artifact, ArtifactStore, Files, download, is_remote, join, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.evaluate.measure import Measured
    from modelyard.stages.evaluate_privacy import Originals
    from modelyard.train.pairs import Pair

_FLOPS_PER_CORE = 20e9
_PROCESS_BYTES = 900_000_000


class EvaluateOptions(StageOptions, EvaluationOptions):
    """Held-out loss, perplexity, bits per byte, loss of answers, and memorized personal data."""

    kind: Literal["evaluate"] = Field(description="stage kind")
    batch: int = runtime(8, "sequences in a forward pass", ge=1)


@dataclass(frozen=True)
class Subject:
    """A model to measure: its name in the report, and where it lies."""

    name: str
    place: tuple[Artifact, str] | str
    document_mask: bool


class EvaluateStage(Stage[EvaluateOptions]):
    """See the module. The models are measured one after the other by one process that has all the cores."""

    kind = "evaluate"
    Options = EvaluateOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=("pretrain", "finetune", "align", "merge"), files=True),
        "base": InputSpec(kinds=("pretrain", "finetune", "align", "merge"), files=True, required=False),
        "tokens": InputSpec(kinds=("tokenize",)),
        "corpus": InputSpec(kinds=("curate",), required=False),
    }

    def check(self, ctx: PlanContext[EvaluateOptions]) -> None:
        """Raises DataError when files given as a model hold no `config.json`."""
        for name in ("model", "base"):
            model_config(ctx.inputs.get(name), name)

    def estimate(self, ctx: PlanContext[EvaluateOptions]) -> Estimate:
        """Memory of the largest model; time of its forward passes at 20 GFLOP/s a core."""
        known = [a.manifest.counts.get("parameters", 0) for a in ctx.inputs.values() if isinstance(a, Artifact)]
        tokens, parameters = ctx.inputs.get("tokens"), max(known, default=0)
        if not isinstance(tokens, Artifact) or not parameters:
            return Estimate(notes=("size and time are known once its inputs are",))
        counts, resources = tokens.manifest.counts, ctx.options.resources
        sequences = min(counts["heldout_sequences"], ctx.options.max_sequences or counts["heldout_sequences"])
        flops = 2.0 * sum(known) * sequences * counts["sequence_length"]
        cores = resources.workers * resources.cpus_per_worker
        return Estimate(
            parameters=parameters,
            flops=flops,
            memory_bytes=_PROCESS_BYTES + 6 * parameters,
            seconds=20 + 2 * flops / (cores * _FLOPS_PER_CORE),
        )

    def run(self, ctx: StageContext[EvaluateOptions]) -> StageResult:
        """Measures on a worker, then writes evaluation.json and report.html."""
        with plain_errors():
            found = _originals(ctx)
            results = {s.name: _measure(ctx, s, found) for s in _subjects(ctx)}
        return _finish(ctx, results, found)


def _subjects(ctx: StageContext[EvaluateOptions]) -> list[Subject]:
    """The base first, then the model."""
    given = {name: ctx.inputs[name] for name in ("base", "model") if name in ctx.inputs}
    names = {key: value.stage if isinstance(value, Artifact) else key for key, value in given.items()}
    if len(set(names.values())) < len(names):
        names = {key: key for key in names}
    return [Subject(names[key], model_place(value, key), _document_mask(value)) for key, value in given.items()]


def _document_mask(model: Artifact | Files) -> bool:
    """Whether the pre-training behind a model kept documents of a sequence apart, as far as it can be told."""
    if not isinstance(model, Artifact):
        return False
    if model.manifest.kind == "pretrain":
        return bool(model.manifest.options.get("document_mask", False))
    before = model.manifest.inputs.get("model")
    if before is None or before.uri is None:
        return False
    try:
        return _document_mask(ArtifactStore(before.uri).open(before.uri))
    except StorageError:
        return False


def _originals(ctx: StageContext[EvaluateOptions]) -> Originals | None:
    import ray

    wanted = ctx.options.privacy.values
    if "corpus" not in ctx.inputs or not wanted:
        return None
    remote = ray.remote(num_cpus=ctx.options.resources.cpus_per_worker)(_find_originals)
    found: Originals = ray.get(remote.remote(ctx.artifact("corpus"), wanted))
    ctx.progress.say(
        f"{len(found.probes):,} scrubbed values to try, from {found.sources:,} raw files"
        + (f" ({found.unreadable:,} are not there any more)" if found.unreadable else "")
    )
    return found


def _find_originals(corpus: Artifact, wanted: int) -> Originals:
    """Runs on a worker."""
    from modelyard.stages.evaluate_privacy import originals

    return originals(corpus, wanted)


def _measure(ctx: StageContext[EvaluateOptions], subject: Subject, found: Originals | None) -> Measured:
    import ray

    options, resources = ctx.options, ctx.options.resources
    cores = resources.workers * resources.cpus_per_worker
    model = ctx.inputs["model"]
    answers = model if isinstance(model, Artifact) and model.manifest.kind == "finetune" else None
    remote = ray.remote(num_cpus=cores, num_gpus=resources.gpus_per_worker)(_run_job)
    stream = remote.options(num_returns="streaming").remote(
        subject, ctx.artifact("tokens"), answers, found, _core_options(options), options.batch, cores
    )
    result: Measured | None = None
    with ctx.progress.task(subject.name, _units(ctx, found, answers), "sequences") as bar:
        for reference in stream:
            item = ray.get(reference)
            if isinstance(item, int):
                bar.advance(item)
            else:
                result = item
    assert result is not None
    ctx.progress.say(
        f"{subject.name}: held-out loss {result.loss.nats:.3f} ± {result.loss.error:.3f} nats, "
        f"{result.bits_per_byte:.3f} bits per byte ({result.seconds:.0f} s)"
    )
    return result


def _core_options(options: EvaluateOptions) -> EvaluationOptions:
    return EvaluationOptions(**{name: getattr(options, name) for name in EvaluationOptions.model_fields})


def _units(ctx: StageContext[EvaluateOptions], found: Originals | None, answers: Artifact | None) -> int:
    """How many sequences, prompts and samples a model goes through."""
    options, held = ctx.options, ctx.artifact("tokens").manifest.counts["heldout_sequences"]
    sequences = min(held, options.max_sequences or held)
    shown = options.samples * (2 if answers else 1)
    return sequences + shown + options.privacy.free_samples + (len(found.probes) if found else 0)


def _run_job(
    subject: Subject,
    tokens: Artifact,
    answers: Artifact | None,
    found: Originals | None,
    options: EvaluationOptions,
    batch: int,
    cores: float,
) -> Iterator[int | Measured]:
    """Runs on a worker: yields numbers of sequences done, and the result last."""
    from modelyard.evaluate.measure import Job, measure
    from modelyard.stages.evaluate_privacy import scanner
    from modelyard.tokens.tokenizer import limit_threads

    limit_threads(cores)
    tokens.local("tokenizer")
    with TemporaryDirectory() as scratch:
        job = Job(
            model=_local(subject.place, scratch),
            tokens=tokens.local("heldout").parent,
            options=options,
            pairs=_pairs(answers, options.max_pairs) if answers else (),
            pair_length=int(answers.manifest.options["sequence_length"]) if answers else 0,
            probes=found.probes if found else (),
            known=found.known if found else frozenset(),
            document_mask=subject.document_mask,
            batch=batch,
        )
        scan = scanner(found.scrub if found else None)
        yield from _streamed(lambda done: measure(job, scan, done), max(1, int(cores)))


def _local(place: tuple[Artifact, str] | str, scratch: str) -> Path:
    if not isinstance(place, str):
        return place[0].local(place[1])
    return download(place, scratch) if is_remote(place) else Path(place)


def _pairs(answers: Artifact, most: int | None) -> tuple[Pair, ...]:
    """Held-out pairs of a fine-tuned model, in an order by hash, at most `most`."""
    from modelyard.train.pairs import read_jsonl

    place = answers.join("heldout.jsonl")
    pairs = read_jsonl(read_bytes(place).decode().split("\n"), place)
    return tuple(sorted(pairs, key=lambda pair: pair.key)[:most])


def _streamed(work: Callable[[Callable[[int], None]], Measured], threads: int) -> Iterator[int | Measured]:
    """What `work` reports while it works in a thread, then what it returns."""
    import torch

    reports: SimpleQueue[int | None] = SimpleQueue()

    def call() -> Measured:
        torch.set_num_threads(threads)
        return work(reports.put)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call)
        future.add_done_callback(lambda _: reports.put(None))
        while (report := reports.get()) is not None:
            yield report
        yield future.result()


def _finish(
    ctx: StageContext[EvaluateOptions], results: Mapping[str, Measured], found: Originals | None
) -> StageResult:
    from modelyard.evaluate.report import page, plain

    unigram = float(json.loads(read_bytes(ctx.artifact("tokens").join("tokens.json")))["unigram_entropy"])
    record = {
        "unigram_entropy": unigram,
        "models": [plain(name, result) for name, result in results.items()],
        "privacy": None
        if found is None
        else {
            "values_tried": len(found.probes),
            "values_found": len(found.known),
            "raw_files": found.sources,
            "raw_files_absent": found.unreadable,
            "types": sorted(found.scrub.actions),
        },
    }
    html = page(f"Evaluation: {ctx.name}", results, unigram, _notes(ctx, found))
    write_bytes(join(ctx.output, "evaluation.json"), (json.dumps(record, indent=1) + "\n").encode())
    write_bytes(join(ctx.output, "report.html"), html.encode())
    ctx.run.log_text("report.html", html)
    return _result(results, unigram)


def _notes(ctx: StageContext[EvaluateOptions], found: Originals | None) -> list[str]:
    notes = [
        "A model that knew only how often each token occurs would have the unigram entropy as its loss. "
        "Bits per byte count every token of the held-out text, end tokens included, over its UTF-8 bytes.",
    ]
    if found is None:
        asked = "no corpus was given" if "corpus" not in ctx.inputs else "privacy.values is 0"
        return [*notes, f"Extraction of personal data was not tested: {asked}."]
    tokens = ctx.options.privacy
    notes.append(
        f"{len(found.probes):,} of {len(found.known):,} values that were scrubbed from the corpus, read again from "
        f"{found.sources:,} raw files, were looked for in {tokens.new_tokens} tokens decoded greedily after the "
        f"{tokens.context_tokens} tokens that stood before them."
    )
    if found.unreadable:
        notes.append(f"{found.unreadable:,} raw files are not there any more; their values were not tried.")
    return notes


def _result(results: Mapping[str, Measured], unigram: float) -> StageResult:
    *before, (name, model) = results.items()
    metrics = _metrics("", model) | {"unigram_entropy": unigram}
    for _, base in before:
        metrics |= _metrics("base_", base)
    path = " -> ".join(f"{n} {r.bits_per_byte:.3f}" for n, r in results.items())
    tried = sum(model.extraction.tried.values())
    reproduced = sum(model.extraction.reproduced.values())
    privacy = f"{reproduced} of {tried} PII values reproduced" if tried else "PII not tested"
    counts = {"heldout_tokens": model.loss.tokens, "parameters": model.parameters, "pii_values": tried}
    return StageResult(f"bits per byte {path}; {privacy}", counts, metrics, {"model": name})


def _metrics(prefix: str, result: Measured) -> dict[str, float]:
    found = {
        "heldout_loss": result.loss.nats,
        "heldout_loss_error": result.loss.error,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "pii_emitted": float(sum(result.emission.emitted.values())),
        "pii_emitted_known": float(result.emission.known),
    }
    if result.completion is not None:
        found["completion_loss"] = result.completion
    # Absent rather than zero where nothing was tried, so that a gate on it cannot pass untested.
    if result.extraction.tried:
        found["pii_reproduced"] = float(sum(result.extraction.reproduced.values()))
    return {prefix + key: value for key, value in found.items()}
