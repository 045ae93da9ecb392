"""A shuffle that can be taken up again: files mapped to partitions by Ray Data, each reduced to one file.

A partition is written whole and named by its number; a record vouches for all files of a shuffle, so that a killed
run goes on behind the last finished one. Memory of a worker: one partition, and what the reducer makes of it.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

from modelyard.recipe.schema import Resources
from modelyard.storage import exists, join, list_files, read_bytes, write_bytes

PARTITION_BYTES = 64_000_000
"""Bytes of keys that a partition is meant to hold."""

Mapper = Callable[[str], Iterator[Any]]
Reducer = Callable[[Any], Any]
Measure = Callable[[Any], int]


@dataclass(frozen=True)
class Written:
    """What a shuffle wrote: its input and number of partitions, its files with sizes, rows, and a sum of measures."""

    identity: list[Any]
    files: dict[str, int]
    rows: int
    total: int


def shuffle(
    files: list[str], mapper: Mapper, reducer: Reducer, out: str, resources: Resources, parts: int,
    measure: Measure | None = None,
) -> Written:  # fmt: skip
    """Maps files to tables with a column `p` in 0..parts-1, brings equal p together, reduces and writes part p.

    A partition's rows come in no fixed order: a reducer's result must not depend on it. When an earlier try has
    finished the same shuffle and its files are whole, nothing is done. `measure` is summed over the results.
    """
    import ray

    from modelyard.stages.curate_ray import rows_of
    from modelyard.stages.remote import blocks
    from modelyard.storage import remove

    identity = [parts, *_sizes(files)]
    if (before := _finished(out, identity)) is not None:
        return before
    remove(out)
    tasks = blocks(len(files), resources.workers)
    items = ray.data.from_items([{"file": name} for name in files], override_num_blocks=tasks)
    mapped = items.map_batches(
        cast(Any, _map), batch_size=1, batch_format="pyarrow", fn_args=(mapper,), num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(min(resources.workers, tasks)),
    )  # fmt: skip
    groups = mapped.groupby("p", num_partitions=parts)
    reduced = groups.map_groups(
        cast(Any, _reduce), batch_format="pyarrow", fn_args=(reducer, out, measure), num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(min(resources.workers, parts)),
    )  # fmt: skip
    rows = list(rows_of(reduced))
    total = sum(row["total"] for row in rows) & ((1 << 63) - 1)
    done = Written(identity, dict(list_files(out)), sum(row["rows"] for row in rows), total)
    write_bytes(f"{out}.json", json.dumps(asdict(done)).encode())
    return done


def _sizes(files: list[str]) -> list[list[Any]]:
    known = {
        join(place, name): size for place in {posixpath.dirname(f) for f in files} for name, size in list_files(place)
    }
    return [[name, known.get(name, -1)] for name in files]


def _finished(out: str, identity: list[Any]) -> Written | None:
    """The record of a shuffle of the same input, when all its files have the sizes they had."""
    if not exists(f"{out}.json"):
        return None
    try:
        done = Written(**json.loads(read_bytes(f"{out}.json")))
    except (ValueError, TypeError):
        return None
    return done if done.identity == identity and dict(list_files(out)) == done.files else None


def _map(batch: Any, mapper: Mapper) -> Iterator[Any]:
    for name in batch["file"].to_pylist():
        yield from mapper(name)


def _reduce(group: Any, reducer: Reducer, out: str, measure: Measure | None) -> Any:
    import pyarrow as pa

    from modelyard.corpus.files import write_parquet
    from modelyard.corpus.unit import part

    number = group["p"][0].as_py()
    result = reducer(group.drop_columns(["p"]))
    write_parquet(join(out, part(number)), result)
    return pa.table({"p": [number], "rows": [result.num_rows], "total": [measure(result) if measure else 0]})


def rows_in(name: str, columns: list[str] | None = None) -> Iterator[Any]:
    """Tables of a file of keys, decisions or edges, 100,000 rows at a time."""
    from modelyard.corpus.files import read_parquet

    return read_parquet(name, 100_000, columns)


def by_table(change: Callable[[Any], Any]) -> Mapper:
    """The mapper that makes a table with a column `p` of each table of a file."""

    def mapper(name: str) -> Iterator[Any]:
        for table in rows_in(name):
            yield change(table)

    return mapper


def to_units(table: Any, parts: int) -> Any:
    """Rows about documents with the partition of each one's unit, the upper half of its address, in `p`."""
    import pyarrow as pa

    return table.append_column("p", pa.array((table["doc"].to_numpy() >> 32) % parts))


def files_in(folder: str) -> list[str]:
    """URIs of the files of a folder, in order."""
    return [join(folder, name) for name, _ in list_files(folder)]
