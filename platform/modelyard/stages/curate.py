"""`curate`: raw files to clean documents, with an audit of everything left out."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.options import CardOptions, ReadOptions, StepOptions
from modelyard.errors import DataError, RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Bytes, StageOptions, runtime
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.storage import Artifact, FileRef, Files, absolute

_BYTES_PER_SECOND = 6_000_000  # of text, one worker, all steps: measured on package documentation
_START_SECONDS = 25.0  # Ray workers, imports, and compiling kernels the first time
_WORKER_BYTES = 900_000_000


class CurateOptions(StageOptions):
    """Reads, cleans, filters, deduplicates and scrubs text."""

    kind: Literal["curate"] = Field("curate", description="stage kind")
    read: ReadOptions = Field(ReadOptions(), description="how files become documents")
    steps: tuple[StepOptions, ...] = Field((), description="what to do with the documents, in order")
    card: CardOptions = Field(CardOptions(), description="source and licence for the data card")
    shuffle_above: Bytes = runtime(
        512_000_000,
        "deduplicate in one process up to this many bytes of keys and of candidate texts; above, over Ray Data's "
        "shuffle; the result is the same",
    )

    @model_validator(mode="after")
    def _quality_first(self) -> CurateOptions:
        scored = False
        for number, step in enumerate(self.steps):
            scored = scored or step.name == "quality"
            if step.dedup is not None and step.dedup.keep == "quality" and not scored:
                raise ValueError(f"step {number}: keep: quality needs a quality step before it")
        return self

    @property
    def scrub(self) -> ScrubOptions | None:
        """The last scrub step, if there is one."""
        found = [step.scrub for step in self.steps if step.scrub is not None]
        return found[-1] if found else None


def file_refs(value: Artifact | Files) -> tuple[list[FileRef], bool]:
    """The files of an input, and whether they are an earlier curate stage's documents."""
    if isinstance(value, Files):
        return list(value.refs), False
    rows = (".parquet", ".jsonl")  # what `generate` was asked to write
    entries = [e for e in value.manifest.files if e.path.startswith("data/") and e.path.endswith(rows)]
    return [FileRef(value.join(e.path), e.bytes, e.checksum) for e in entries], value.manifest.kind == "curate"


def _check_named(ctx: PlanContext[CurateOptions]) -> None:
    place, given = f"{ctx.name}.inputs", set(ctx.options.inputs) - {"files"}
    wanted = {name: step.name for step in ctx.options.steps for name in step.inputs}
    for name, step in wanted.items():
        if name not in given:
            known = ", ".join(sorted(given)) or "none besides files"
            raise RecipeError(
                f"{step} reads the input {name!r}", place=place, mend=f"add `{name}: ...` (inputs: {known})"
            )
    if unused := sorted(given - set(wanted)):
        names = ", ".join(sorted(wanted)) or "only files"
        raise RecipeError(f"no step reads the input {unused[0]!r}", place=place, mend=f"inputs that are read: {names}")


def named_files(value: Artifact | Files) -> tuple[str, ...]:
    """URIs of the files of an input that steps name: those of a stage's result, or raw ones."""
    if isinstance(value, Files):
        return tuple(absolute(ref.uri) for ref in value.refs)
    documents = value.manifest.kind == "curate"
    return tuple(value.join(e.path) for e in value.manifest.files if not documents or e.path.startswith("data/"))


class CurateStage(Stage[CurateOptions]):
    """Runs the corpus core over Ray Data. See `docs/corpus.md`."""

    kind = "curate"
    version = 2
    Options: ClassVar[type[StageOptions]] = CurateOptions
    inputs: ClassVar = {"files": InputSpec(kinds=("curate", "generate"), files=True)}

    def input_specs(self, given: Iterable[str]) -> dict[str, InputSpec]:
        """`files`, and by any other name what steps read: evaluation sets, word lists, classifiers."""
        named = InputSpec(kinds=("classifier", "curate"), files=True, required=False)
        return dict(self.inputs) | {name: named for name in given if name not in self.inputs}

    def check(self, ctx: PlanContext[CurateOptions]) -> None:
        """Input is there, what steps name is an input, and a pseudonym key and a model where they are needed.

        Raises:
            DataError: the input has no bytes.
            RecipeError: `pseudonymize` without a usable key, a model of names that is not installed, a step
                that names no input, or an input that no step names.
        """
        _check_named(ctx)
        for step in ctx.options.steps:
            if step.scrub is not None and step.scrub.ner is not None:
                from modelyard.corpus.names import check

                check(step.scrub.ner)
            if step.scrub is not None and step.scrub.pseudonymizes:
                from modelyard.corpus.pseudonym import load_key

                load_key(step.scrub.key_file)
        given = ctx.inputs.get("files")
        if given is not None and not sum(ref.bytes for ref in file_refs(given)[0]):
            raise DataError("the input holds no data", place=f"{ctx.name}.inputs.files", mend="check paths and exclude")

    def estimate(self, ctx: PlanContext[CurateOptions]) -> Estimate:
        """Time from the bytes to read at a measured rate; memory of one worker."""
        given = ctx.inputs.get("files")
        if given is None:
            return Estimate(memory_bytes=_WORKER_BYTES, notes=("input not there yet",))
        size = sum(ref.bytes for ref in file_refs(given)[0])
        seconds = _START_SECONDS + size / _BYTES_PER_SECOND / ctx.options.resources.workers
        return Estimate(memory_bytes=_WORKER_BYTES, seconds=seconds, notes=(f"reads {size / 1e6:,.0f} MB",))

    def run(self, ctx: StageContext[CurateOptions]) -> StageResult:
        """Curates. Raises DataError when nothing is left or too much is unreadable, StageError on a leak."""
        from modelyard.stages.curate_run import curate

        if not ctx.options.steps and ctx.options.read == ReadOptions():
            ctx.progress.say("no steps: documents are only read")
        return curate(ctx)
