"""Stage `generate`: batch inference. Each row of JSONL or Parquet files gets an answer, one output row each."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from modelyard.align.reward_options import StepsRule
from modelyard.engine import choose
from modelyard.engine.options import EngineOptions
from modelyard.errors import DataError, RecipeError, StageError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Options, StageOptions, runtime
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.best_of import check_best_of
from modelyard.stages.deploy import model_uri
from modelyard.stages.generate_units import Unit, dump, parse, plan
from modelyard.storage import Artifact, Files, exists, is_remote, join, list_files, read_bytes, remove, write_bytes

WORKER_BYTES = 600_000_000
"""An engine process with torch, without weights (measured)."""


class SamplingOptions(Options):
    """How answers are chosen. The defaults give the same answers every time."""

    max_tokens: int = Field(256, ge=1, description="tokens of an answer at most; less where the model's length ends")
    temperature: float = Field(0.0, ge=0, le=100, description="divides the logits; 0 = the most probable token")
    top_p: float = Field(1.0, gt=0, le=1, description="smallest set of tokens with this probability mass; 1 = all")
    top_k: int = Field(0, ge=0, description="most probable tokens to choose from; 0 = all")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="against repeated tokens (CTRL); 1 = off")
    stop: tuple[str, ...] = Field((), max_length=16, description="strings that end an answer")
    seed: int = Field(0, ge=0, description="of the first row; each later row has the next one")


class BestOfOptions(Options):
    """Rejection sampling: of several answers the one that a reward model likes best."""

    answers: int = Field(8, ge=2, le=1024, description="answers drawn for each row (best of n)")
    steps: StepsRule = Field("min", description="of a process reward model, what an answer's steps come to")


class GenerateOptions(StageOptions):
    """Batch inference over the rows of files."""

    kind: Literal["generate"] = Field("generate", description="stage kind")
    prompt: str = Field("prompt", min_length=1, description="field or column that holds a prompt as text")
    messages: str = Field("messages", min_length=1, description="field that holds a conversation; wins over prompt")
    system: str | None = Field(None, description="system turn put before every chat prompt")
    chat: bool = Field(True, description="put prompts into the model's chat template, if it has one")
    output: str = Field("generated", pattern="^[A-Za-z_][A-Za-z0-9_]*$", description="name of the new fields")
    sampling: SamplingOptions = Field(SamplingOptions(), description="how answers are chosen")
    best_of: BestOfOptions | None = Field(
        None, description="draw several answers and keep the best by the input `reward`; null = one answer"
    )
    max_errors: float = Field(
        0.05, ge=0, le=1, description="share of rows that may end with an error; above it the stage fails"
    )
    engine: EngineOptions = runtime(EngineOptions(), "engine of each worker")
    rows_a_unit: int = runtime(512, "rows of one output file, which is what a resumed run does not repeat", ge=1)


class GenerateStage(Stage[GenerateOptions]):
    """See the module."""

    kind = "generate"
    version = 2
    Options = GenerateOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=("pretrain", "finetune", "align", "merge", "register"), files=True),
        "rows": InputSpec(kinds=("curate", "generate"), files=True),
        "reward": InputSpec(kinds=("reward",), files=True, required=False),
    }

    def check(self, ctx: PlanContext[GenerateOptions]) -> None:
        """Raises RecipeError for equal field names or a best answer that cannot be told, DataError for files that are
        no rows or no model."""
        if ctx.options.prompt == ctx.options.messages:
            raise RecipeError("prompt and messages name the same field", place="messages", mend="name two fields")
        choose.check(ctx.options.engine, ctx.options.resources.gpus_per_worker, here=ctx.here)
        check_best_of(ctx)
        if (rows := ctx.inputs.get("rows")) is not None:
            parquet = [uri for uri in _uris(rows) if uri.endswith(".parquet")]
            plan(parquet, ctx.options.rows_a_unit, ctx.options.output, ctx.options.best_of is not None)
            wrong = [uri for uri in _uris(rows) if not uri.endswith((".parquet", ".jsonl", ".ndjson"))]
            if wrong:
                raise DataError("neither JSONL nor Parquet", place=wrong[0], mend="give .jsonl or .parquet files")
        model = ctx.inputs.get("model")
        if model is not None and not is_remote(uri := model_uri(model)):
            from modelyard.engine.checkpoint import check_folder

            check_folder(Path(uri))

    def estimate(self, ctx: PlanContext[GenerateOptions]) -> Estimate:
        """Memory of a worker: its process and the weights. Time depends on the lengths of the answers."""
        model = ctx.inputs.get("model")
        if model is None:
            return Estimate(notes=("the model is not there yet",))
        weights = sum(size for name, size in list_files(model_uri(model)) if name.endswith(".safetensors"))
        return Estimate(memory_bytes=WORKER_BYTES + 2 * weights)

    def run(self, ctx: StageContext[GenerateOptions]) -> StageResult:
        """Answers every row. Raises DataError for empty input, StageError for rows lost or too many errors."""
        started, o = time.perf_counter(), ctx.options
        units = _units(ctx)
        done = _records(ctx)
        todo = [unit for unit in units if unit.index not in done]
        if done:
            ctx.progress.say(f"{len(done)} of {len(units)} units were done before")
        total = sum(unit.rows for unit in units)
        with ctx.progress.task("generate", total, "rows") as bar:
            bar.advance(sum(record["rows"] for record in done.values()))
            for record in _run(ctx, todo):
                bar.advance(record["rows"], errors=record["errors"])
                done[record["index"]] = record
                ctx.run.log_metrics({"rows_done": sum(r["rows"] for r in done.values())}, step=len(done))
        return _result(ctx, units, time.perf_counter() - started, o)


def _uris(rows: Artifact | Files) -> list[str]:
    if isinstance(rows, Files):
        return [ref.uri for ref in rows.refs]
    return [rows.join("data", name) for name, _ in list_files(rows.join("data"))]


def _units(ctx: StageContext[GenerateOptions]) -> list[Unit]:
    """The plan of an earlier try, or a new one; another size of units starts anew."""
    place, key = join(ctx.work, "units.json"), ctx.options.rows_a_unit
    if exists(place):
        kept = json.loads(read_bytes(place))
        if kept["rows_a_unit"] == key:
            return [parse(text) for text in kept["units"]]
        for folder in (join(ctx.output, "data"), join(ctx.work, "done")):
            if exists(folder):
                remove(folder)
    units = plan(_uris(ctx.inputs["rows"]), key, ctx.options.output, ctx.options.best_of is not None)
    if not units:
        raise DataError("the input has no rows", place="inputs.rows", mend="give files with rows")
    write_bytes(place, json.dumps({"rows_a_unit": key, "units": [dump(unit) for unit in units]}).encode())
    return units


def _records(ctx: StageContext[GenerateOptions]) -> dict[int, dict[str, Any]]:
    """Records of finished units; a record is written after its file."""
    folder = join(ctx.work, "done")
    if not exists(folder):
        return {}
    records = [json.loads(read_bytes(join(folder, name))) for name, _ in list_files(folder)]
    return {record["index"]: record for record in records}


def _run(ctx: StageContext[GenerateOptions], units: list[Unit]) -> Any:
    """Records of units as they are finished, by engine actors of Ray Data."""
    from typing import cast

    import ray

    from modelyard.stages.curate_ray import quiet, rows_of
    from modelyard.stages.generate_worker import Writer

    if not units:
        return
    o, r = ctx.options, ctx.options.resources
    engine = o.engine.placed(r.gpus_per_worker)
    engine = engine if engine.threads else engine.model_copy(update={"threads": max(1, int(r.cpus_per_worker))})
    how = o.model_dump(include={"prompt", "messages", "system", "chat", "output", "sampling"})
    best = (model_uri(ctx.inputs["reward"]), o.best_of.answers, o.best_of.steps) if o.best_of is not None else None
    arguments = (model_uri(ctx.inputs["model"]), engine.model_dump(), how, join(ctx.output, "data"),
                 join(ctx.work, "done"), best)  # fmt: skip
    with quiet():
        dataset = ray.data.from_items([{"unit": dump(unit)} for unit in units], override_num_blocks=len(units))
        answered = dataset.map_batches(
            cast(Any, Writer), fn_constructor_args=arguments, batch_size=1, num_cpus=r.cpus_per_worker,
            num_gpus=r.gpus_per_worker or None, compute=ray.data.ActorPoolStrategy(size=min(r.workers, len(units))),
        )  # fmt: skip
        for row in rows_of(answered):
            yield json.loads(row["record"])


def _result(
    ctx: StageContext[GenerateOptions], units: list[Unit], seconds: float, options: GenerateOptions
) -> StageResult:
    """Checks that every row of the input has one row in the output, and sums up."""
    records = _records(ctx)
    rows, errors = sum(unit.rows for unit in units), sum(record["errors"] for record in records.values())
    names = {name for name, _ in list_files(join(ctx.output, "data"))}
    lost = [unit for unit in units if records.get(unit.index, {}).get("rows") != unit.rows or unit.part not in names]
    if lost:
        raise StageError(
            f"{len(lost)} units have not one output row for each input row", place=lost[0].uri,
            mend="did the input change while it was read? run again",
        )  # fmt: skip
    if errors > options.max_errors * rows:
        raise DataError(
            f"{errors:,} of {rows:,} rows ended with an error, the first: {_first_error(ctx, units, records)}",
            place="inputs.rows", mend="mend the rows or the names of their fields, or raise max_errors",
        )  # fmt: skip
    counts = {"rows": rows, "errors": errors}
    counts |= {name: sum(record[name] for record in records.values()) for name in ("prompt_tokens", "tokens")}
    rate = counts["tokens"] / seconds
    return StageResult(
        f"{rows:,} rows answered with {counts['tokens']:,} tokens, {errors:,} errors, {rate:,.0f} tokens/s",
        counts=counts, metrics={"tokens_per_second": rate, "generate_seconds": seconds},
    )  # fmt: skip


def _first_error(ctx: StageContext[GenerateOptions], units: list[Unit], records: dict[int, dict[str, Any]]) -> str:
    from dataclasses import replace

    from modelyard.stages.generate_units import read_rows

    unit = next(unit for unit in units if records[unit.index]["errors"])
    column, uri = f"{ctx.options.output}_error", join(ctx.output, "data", unit.part)
    size = len(read_bytes(uri))
    rows = read_rows(replace(unit, uri=uri, first=0, start=0, end=size))
    return next(str(row[column]) for row in rows if isinstance(row, dict) and row[column])
