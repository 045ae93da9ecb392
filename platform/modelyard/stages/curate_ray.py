"""Ray Data under the curate stage: units side by side, and the shuffles of deduplication.

Everything here hands Ray Data small rows (names of files, keys, decisions); the work itself is in
`modelyard.corpus`. Filesystems are built inside the tasks from URIs, so `s3://` works with any endpoint.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, cast

from modelyard.corpus.dedup_options import DedupMethod, ExactOptions, ParagraphOptions, SemanticOptions
from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.read.units import Piece, Unit
from modelyard.recipe.schema import Resources
from modelyard.stages.remote import blocks, plain_errors
from modelyard.storage import join, list_files, write_bytes

if TYPE_CHECKING:
    from modelyard.corpus.unit import Segment


@contextmanager
def quiet() -> Iterator[None]:
    """Ray Data without its own progress bars and plan printouts: ours are enough."""
    from ray.data import DataContext

    context = DataContext.get_current()
    bars, operators = context.enable_progress_bars, context.enable_operator_progress_bars
    logger = logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = context.enable_operator_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars, context.enable_operator_progress_bars = bars, operators
        logger.setLevel(level)


def rows_of(dataset: Any) -> Iterator[dict[str, Any]]:
    """Rows of a small result as they come; an error of ours inside a task is raised as itself."""
    with plain_errors():
        for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch.to_pylist()


def each(items: list[dict[str, Any]], work: Callable[..., Any], resources: Resources, *args: Any) -> Any:
    """A dataset of `work(item, *args)` -> table for each item."""
    import ray

    tasks = blocks(len(items), resources.workers)
    dataset = ray.data.from_items(items, override_num_blocks=tasks)
    return dataset.map_batches(
        cast(Any, _call), batch_size=None, batch_format="pyarrow", fn_args=(work, args),
        num_cpus=resources.cpus_per_worker, compute=ray.data.TaskPoolStrategy(min(resources.workers, tasks)),
    )  # fmt: skip


def _call(batch: Any, work: Callable[..., Any], args: tuple[Any, ...]) -> Iterator[Any]:
    for item in batch.to_pylist():
        yield from work(item, *args)


def run_units(work: list[Unit], segment: Segment, done: str, resources: Resources) -> Iterator[bytes]:
    """Runs units side by side and yields each one's record as it is finished and written to folder `done`."""
    if not work:
        return
    items = [{"unit": json.dumps(asdict(unit))} for unit in work]
    for row in rows_of(each(items, _unit, resources, segment, done)):
        yield row["record"]


def _unit(item: dict[str, Any], segment: Segment, done: str) -> Iterator[Any]:
    import pyarrow as pa

    from modelyard.corpus.unit import run_unit

    plain = json.loads(item["unit"])
    unit = Unit(plain["index"], tuple(Piece(**piece) for piece in plain["pieces"]))
    record = run_unit(unit, segment).dump()
    write_bytes(join(done, f"unit-{unit.index:05d}.json"), record)
    yield pa.table({"record": pa.array([record], pa.binary())})


def leaks(files: list[str], options: ScrubOptions, resources: Resources) -> list[tuple[str, str]]:
    """(document id, entity type) of every entity that a scan of finished files still finds, at most 100 a file."""
    if not files:
        return []
    rows = rows_of(each([{"file": name} for name in files], _leaks, resources, options))
    return [(row["id"], row["type"]) for row in rows]


def _leaks(item: dict[str, Any], options: ScrubOptions) -> Iterator[Any]:
    import pyarrow as pa

    from modelyard.corpus.files import read_parquet
    from modelyard.corpus.steps.scrub import Scrub

    step = Scrub(options)
    found = [leak for table in read_parquet(item["file"], 2000) for leak in step.leaks(table)][:100]
    names = [name for name, _ in found], [kind for _, kind in found]
    yield pa.table({"id": pa.array(names[0], pa.string()), "type": pa.array(names[1], pa.string())})


def deduplicate(segment: Segment, options: DedupMethod, limit: int, resources: Resources) -> dict[str, Any]:
    """Writes the decisions of a segment and returns their record: partitions, files, documents, removed, how.

    Up to `limit` bytes of keys, and of candidate texts, one task does it all; above, Ray Data shuffles.
    Both give the same decisions.
    """
    from modelyard.stages import curate_dedup

    files = [name for name, _ in list_files(segment.keys)]
    stored = sum(size for _, size in list_files(segment.keys))
    record = None
    if stored <= limit:
        rows = list(rows_of(each([{"files": json.dumps(files)}], _local, resources, segment, options, limit)))
        record = json.loads(rows[0]["record"])
    if record is None:
        record = curate_dedup.deduplicate(segment, options, files, stored, resources)
    folder = join(segment.keys.rsplit("/", 1)[0], "decisions")
    return {**record, "files": dict(list_files(folder))}


def _local(item: dict[str, Any], segment: Segment, options: DedupMethod, limit: int) -> Iterator[Any]:
    """All of it in one process, or null when the keys or the candidates' texts exceed `limit` bytes."""
    import pyarrow as pa

    from modelyard.corpus.files import read_parquet, write_parquet
    from modelyard.corpus.unit import part

    tables = [t for name in json.loads(item["files"]) for t in read_parquet(join(segment.keys, name), 1 << 20)]
    record: dict[str, Any] | None = {"partitions": 1, "documents": 0, "removed": 0, "how": "in one process"}
    if tables:
        table = pa.concat_tables(tables)
        decisions = _decisions(table, segment, options, limit) if table.nbytes <= limit else None
        if decisions is None:
            record = None
        else:
            write_parquet(join(segment.keys.rsplit("/", 1)[0], "decisions", part(0)), decisions)
            record = {**record, "documents": table.num_rows, "removed": decisions.num_rows}  # type: ignore[dict-item]
    yield pa.table({"record": [json.dumps(record)]})


def _decisions(table: Any, segment: Segment, options: DedupMethod, limit: int) -> Any | None:
    """Decisions on a whole key table; None when the texts to compare exceed `limit` bytes."""
    import pyarrow as pa

    from modelyard.corpus import dedup, paragraphs, semantic
    from modelyard.corpus.unit import texts

    if isinstance(options, ExactOptions):
        return dedup.equal(table)
    if isinstance(options, ParagraphOptions):
        return paragraphs.repeated(table)
    if isinstance(options, SemanticOptions):
        return semantic.decide(table, options)
    some = dedup.candidates(table)
    if options.verify == "estimate" or not some.num_rows:
        return dedup.decide_unseen(some, options)
    if pa.compute.sum(some["bytes"]).as_py() > limit:
        return None
    return dedup.decide(some, texts(segment.documents, some["doc"].to_numpy()), options)
