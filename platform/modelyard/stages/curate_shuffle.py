"""Deduplication over Ray Data's shuffle, for keys or candidates that one process should not hold.

    exact    keys -> by digest -> decisions -> by unit
    minhash  band keys -> by key -> edges -> components -> candidates' texts -> by component -> decisions -> by unit

Each shuffle goes to a number of partitions that follows from the data's size, and each partition is one
file, written whole. Memory of a worker: one partition (about 64 MB of keys), or the texts of one
component of candidates if that is larger. Components of up to 100 million edges (40 bytes each) are
found in one task; beyond that the stage asks for a higher threshold.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from modelyard.corpus.options import ExactOptions, MinHashOptions
from modelyard.errors import ResourceError
from modelyard.recipe.schema import Resources
from modelyard.storage import join, list_files

if TYPE_CHECKING:
    from modelyard.corpus.unit import Segment

MAX_EDGES = 100_000_000
PARTITION_BYTES = 64_000_000
_TEXT_ROWS = 2000

Mapper = Callable[[str], Iterator[Any]]
Reducer = Callable[[Any], Any]


def deduplicate(
    segment: Segment, options: ExactOptions | MinHashOptions, files: list[str], stored: int, resources: Resources
) -> dict[str, Any]:
    """Decisions by unit partition; see `curate_ray.deduplicate`."""
    folder = posixpath.dirname(segment.keys)
    keys = [join(segment.keys, name) for name in files]
    parts = max(1, min(1000, 2 * stored // PARTITION_BYTES + 1))
    if isinstance(options, ExactOptions):
        shuffle(keys, _by_digest(parts), _equal, join(folder, "found"), resources, parts)
    else:
        shuffle(keys, _by_band(parts), _edges, join(folder, "edges"), resources, parts)
        _components(folder, resources)
        mapper = _by_component(segment, join(folder, "labels"), parts)
        shuffle(keys, mapper, partial(_decide, options=options), join(folder, "found"), resources, parts)
    return _by_unit(folder, keys, resources)


def shuffle(files: list[str], mapper: Mapper, reducer: Reducer, out: str, resources: Resources, parts: int) -> None:
    """Maps files to tables with a column `p` in 0..parts-1, brings equal p together, reduces and writes part p.

    A partition's rows come in no fixed order: a reducer's result must not depend on it.
    """
    import ray

    from modelyard.stages.curate_ray import rows_of
    from modelyard.storage import remove

    remove(out)
    items = ray.data.from_items([{"file": name} for name in files], override_num_blocks=len(files))
    mapped = items.map_batches(
        cast(Any, _map), batch_size=1, batch_format="pyarrow", fn_args=(mapper,), num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(min(resources.workers, len(files))),
    )  # fmt: skip
    groups = mapped.groupby("p", num_partitions=parts)
    reduced = groups.map_groups(
        cast(Any, _reduce), batch_format="pyarrow", fn_args=(reducer, out), num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(min(resources.workers, parts)),
    )  # fmt: skip
    for _ in rows_of(reduced):
        pass


def _map(batch: Any, mapper: Mapper) -> Iterator[Any]:
    for name in batch["file"].to_pylist():
        yield from mapper(name)


def _reduce(group: Any, reducer: Reducer, out: str) -> Any:
    import pyarrow as pa

    from modelyard.corpus.files import write_parquet
    from modelyard.corpus.unit import part

    number = group["p"][0].as_py()
    size = write_parquet(join(out, part(number)), reducer(group.drop_columns(["p"])))
    return pa.table({"p": [number], "bytes": [size]})


def _read(name: str, columns: list[str] | None = None) -> Iterator[Any]:
    from modelyard.corpus.files import read_parquet

    return read_parquet(name, 100_000, columns)


def _by_digest(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import pyarrow as pa

        from modelyard.corpus.dedup import key_matrix

        for table in _read(name):
            yield table.append_column("p", pa.array((key_matrix(table)[:, 0] % parts).astype("int64")))

    return mapper


def _equal(table: Any) -> Any:
    from modelyard.corpus.dedup import equal

    return equal(table)


def _by_band(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import numpy as np
        import pyarrow as pa

        from modelyard.corpus.dedup import key_matrix

        for table in _read(name, ["doc", "keys"]):
            matrix = key_matrix(table)
            flat = matrix.reshape(-1)
            docs = np.repeat(table["doc"].to_numpy(), matrix.shape[1])
            yield pa.table({"key": flat, "doc": docs, "p": (flat % parts).astype("int64")})

    return mapper


def _edges(table: Any) -> Any:
    from modelyard.corpus.dedup import edges

    return edges(table)


def _components(folder: str, resources: Resources) -> None:
    """Writes labels/part-00000: doc, component, of all documents on an edge."""
    from modelyard.stages.curate_ray import each, rows_of

    for _ in rows_of(each([{"folder": folder}], _label, resources)):
        pass


def _label(item: dict[str, Any]) -> Iterator[Any]:
    import numpy as np
    import pyarrow as pa

    from modelyard.corpus.dedup import components
    from modelyard.corpus.files import write_parquet
    from modelyard.corpus.unit import part

    place = join(item["folder"], "edges")
    tables = [table for name, _ in list_files(place) for table in _read(join(place, name))]
    count = sum(table.num_rows for table in tables)
    if count > MAX_EDGES:
        raise ResourceError(
            f"{count:,} candidate pairs are more than the {MAX_EDGES:,} whose clusters one task can find",
            place=place,
            mend="raise dedup.jaccard, lower dedup.recall, or run dedup exact first",
        )
    if tables:
        edges = pa.concat_tables(tables)
        labels = components(edges["small"].to_numpy(), edges["large"].to_numpy())
    else:
        labels = components(np.zeros(0, np.int64), np.zeros(0, np.int64))
    write_parquet(join(item["folder"], "labels", part(0)), labels)
    yield pa.table({"documents": [labels.num_rows]})


def _by_component(segment: Segment, labels: str, parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        from modelyard.corpus.unit import part, texts

        for table in _read(name):
            first, last = (pc.min(table["doc"]).as_py(), pc.max(table["doc"]).as_py())
            known = [t.filter(pc.and_(pc.greater_equal(t["doc"], first), pc.less_equal(t["doc"], last)))
                     for t in _read(join(labels, part(0)))]  # fmt: skip
            if not known or not (found := pa.concat_tables(known)).num_rows:
                continue
            docs, wanted = table["doc"].to_numpy(), found["doc"].to_numpy()
            rows = np.flatnonzero(np.isin(docs, wanted))
            component = found["component"].to_numpy()[np.searchsorted(wanted, docs[rows])]
            some = table.take(pa.array(rows)).append_column("text", texts(segment.documents, docs[rows]))
            yield some.append_column("p", pa.array(component % parts))

    return mapper


def _decide(table: Any, options: MinHashOptions) -> Any:
    from modelyard.corpus.dedup import decide

    return decide(table.drop_columns(["text"]), table["text"], options)


def _by_unit(folder: str, keys: list[str], resources: Resources) -> dict[str, Any]:
    """Brings decisions to the units that apply them, and counts."""
    found = join(folder, "found")
    names = [join(found, name) for name, _ in list_files(found)]
    parts = max(1, min(1000, sum(size for _, size in list_files(found)) // PARTITION_BYTES))
    if names:

        def mapper(name: str) -> Iterator[Any]:
            import pyarrow as pa

            for table in _read(name):
                yield table.append_column("p", pa.array((table["doc"].to_numpy() >> 32) % parts))

        shuffle(names, mapper, _sorted, join(folder, "decisions"), resources, parts)
    removed = sum(t.num_rows for name in names for t in _read(name, ["doc"]))
    documents = sum(t.num_rows for name in keys for t in _read(name, ["doc"]))
    how = f"over {parts} partitions"
    return {"partitions": parts, "documents": documents, "removed": removed, "how": how}


def _sorted(table: Any) -> Any:
    return table.sort_by("doc")
