"""Deduplication over Ray Data's shuffle, for keys or candidates that one process should not hold.

    exact       keys -> by digest -> decisions -> by unit
    paragraphs  keys -> by digest -> spans -> by unit
    semantic    keys -> by cluster -> decisions -> by unit
    minhash     band keys -> by key -> edges -> components -> candidates' texts -> by component -> decisions -> by unit

Each shuffle goes to a number of partitions that follows from the data's size, and each partition is one
file, written whole; a record vouches for all files of a shuffle, so that a killed run goes on behind the last
finished one. Memory of a worker: one partition (about 64 MB of keys), or the texts of one component of
candidates, or one cluster of vectors, if that is larger. Components of up to 10 million edges (40 bytes each)
are found in one task; more of them by alternating stars (`corpus.stars`), a shuffle a step.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from modelyard.corpus.dedup_options import (
    DedupMethod,
    ExactOptions,
    MinHashOptions,
    ParagraphOptions,
    SemanticOptions,
)
from modelyard.recipe.schema import Resources
from modelyard.storage import exists, join, list_files, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.corpus.unit import Segment

MAX_EDGES = 10_000_000
PARTITION_BYTES = 64_000_000

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


def deduplicate(
    segment: Segment, options: DedupMethod, files: list[str], stored: int, resources: Resources
) -> dict[str, Any]:
    """Decisions by unit partition; see `curate_ray.deduplicate`."""
    folder = posixpath.dirname(segment.keys)
    keys = [join(segment.keys, name) for name in files]
    parts = max(1, min(1000, 2 * stored // PARTITION_BYTES + 1))
    found = join(folder, "found")
    if isinstance(options, ExactOptions):
        shuffle(keys, _by_digest(parts), _equal, found, resources, parts)
    elif isinstance(options, ParagraphOptions):
        shuffle(keys, _by_digest(parts), _repeated, found, resources, parts)
    elif isinstance(options, SemanticOptions):
        clusters = _centroids(folder, keys, options, resources)
        mapper = _by_cluster(join(folder, "centroids.npy"))
        shuffle(keys, mapper, partial(_alike, options=options), found, resources, clusters)
    else:
        _minhash(segment, options, keys, parts, resources)
    return _by_unit(folder, keys, resources)


def _minhash(segment: Segment, options: MinHashOptions, keys: list[str], parts: int, resources: Resources) -> None:
    folder = posixpath.dirname(segment.keys)
    edges = shuffle(keys, _by_band(parts), _edges, join(folder, "edges"), resources, parts, _total)
    labels = _components(folder, edges, resources)
    mapper = _by_component(segment, join(folder, "labels"), labels, parts, texts=options.verify != "estimate")
    shuffle(keys, mapper, partial(_decide, options=options), join(folder, "found"), resources, parts)


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
    from modelyard.storage import remove

    identity = [parts, *_sizes(files)]
    if (before := _finished(out, identity)) is not None:
        return before
    remove(out)
    items = ray.data.from_items([{"file": name} for name in files], override_num_blocks=len(files))
    mapped = items.map_batches(
        cast(Any, _map), batch_size=1, batch_format="pyarrow", fn_args=(mapper,), num_cpus=resources.cpus_per_worker,
        compute=ray.data.TaskPoolStrategy(min(resources.workers, len(files))),
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


def _read(name: str, columns: list[str] | None = None) -> Iterator[Any]:
    from modelyard.corpus.files import read_parquet

    return read_parquet(name, 100_000, columns)


def _names(folder: str) -> list[str]:
    return [join(folder, name) for name, _ in list_files(folder)]


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


def _repeated(table: Any) -> Any:
    from modelyard.corpus.paragraphs import repeated

    return repeated(table)


def _centroids(folder: str, keys: list[str], options: SemanticOptions, resources: Resources) -> int:
    """Writes centroids.npy, made in one task from a sample, and returns how many clusters there are."""
    from modelyard.stages.curate_ray import each, rows_of

    item = {"files": json.dumps(keys), "to": join(folder, "centroids.npy")}
    return int(next(iter(rows_of(each([item], _fit, resources, options))))["clusters"])


def _fit(item: dict[str, Any], options: SemanticOptions) -> Iterator[Any]:
    import numpy as np
    import pyarrow as pa

    from modelyard.corpus import semantic

    names = json.loads(item["files"])
    documents = sum(table.num_rows for name in names for table in _read(name, ["doc"]))
    clusters = semantic.cluster_count(documents, options)
    sample, first = [], None
    for name in names:
        for table in _read(name, ["doc", "vector"]):
            vectors = semantic.vectors_of(table)
            first = vectors[:1] if first is None else first
            some = semantic.sampled(table["doc"].to_numpy(), documents, clusters, vectors.shape[1], options.seed)
            sample.append(vectors[some])
    chosen = np.concatenate(sample)
    found = semantic.centres(chosen if len(chosen) else first, clusters, options.iterations, options.seed)  # type: ignore[arg-type]
    sink = io.BytesIO()
    np.save(sink, found)
    write_bytes(item["to"], sink.getvalue())
    yield pa.table({"clusters": [len(found)]})


def _by_cluster(centroids: str) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import numpy as np
        import pyarrow as pa

        from modelyard.corpus import semantic

        found = np.load(io.BytesIO(read_bytes(centroids)), allow_pickle=False)
        for table in _read(name):
            yield table.append_column("p", pa.array(semantic.nearest(semantic.vectors_of(table), found)))

    return mapper


def _alike(table: Any, options: SemanticOptions) -> Any:
    from modelyard.corpus.semantic import alike

    return alike(table, options)


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


def _total(edges: Any) -> int:
    from modelyard.corpus.stars import total

    return total(edges)


def _components(folder: str, edges: Written, resources: Resources) -> int:
    """Writes labels/part-*: doc, component, of all documents on an edge; returns over how many files, by unit."""
    from modelyard.stages.curate_ray import each, rows_of

    if edges.rows <= MAX_EDGES:
        for _ in rows_of(each([{"folder": folder}], _label, resources)):
            pass
        return 1
    parts = max(2, min(1000, 16 * edges.rows // PARTITION_BYTES))
    stars = _stars(folder, edges, resources, parts)
    shuffle(_names(stars), _labels_by_unit(parts), _unique, join(folder, "labels"), resources, parts)
    return parts


def _label(item: dict[str, Any]) -> Iterator[Any]:
    import pyarrow as pa

    from modelyard.corpus.dedup import components
    from modelyard.corpus.files import write_parquet
    from modelyard.corpus.stars import EDGES
    from modelyard.corpus.unit import part

    tables = [table for name in _names(join(item["folder"], "edges")) for table in _read(name)]
    edges = pa.concat_tables(tables or [EDGES.empty_table()])
    labels = components(edges["small"].to_numpy(), edges["large"].to_numpy())
    write_parquet(join(item["folder"], "labels", part(0)), labels)
    yield pa.table({"documents": [labels.num_rows]})


def _stars(folder: str, edges: Written, resources: Resources, parts: int) -> str:
    """The folder with the edges of stars, one a component, that rounds of large and small stars come to."""
    from modelyard.storage import remove

    state: dict[str, Any] = {"at": "edges", "turn": 0, "total": edges.total}
    place = join(folder, "stars.json")
    if exists(place):
        state = json.loads(read_bytes(place))
    while True:
        turn, at = state["turn"], state["at"]
        large, small = join(folder, f"large-{turn}"), join(folder, f"small-{turn}")
        shuffle(_names(join(folder, at)), _around_both(parts), _large_star, large, resources, parts)
        done = shuffle(_names(large), _around_large(parts), _small_star, small, resources, parts, _total)
        if done.total == state["total"]:
            return small
        state = {"at": f"small-{turn}", "turn": turn + 1, "total": done.total}
        write_bytes(place, json.dumps(state).encode())
        for old in (large, *([join(folder, at)] if turn else [])):
            remove(old)


def _around_both(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        from modelyard.corpus.stars import around_both

        for table in _read(name):
            yield around_both(table, parts)

    return mapper


def _around_large(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        from modelyard.corpus.stars import around_large

        for table in _read(name):
            yield around_large(table, parts)

    return mapper


def _large_star(rows: Any) -> Any:
    from modelyard.corpus.stars import large_star

    return large_star(rows)


def _small_star(rows: Any) -> Any:
    from modelyard.corpus.stars import small_star

    return small_star(rows)


def _labels_by_unit(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import pyarrow as pa

        from modelyard.corpus.stars import labels

        for table in _read(name):
            rows = labels(table)
            yield rows.append_column("p", pa.array((rows["doc"].to_numpy() >> 32) % parts))

    return mapper


def _unique(table: Any) -> Any:
    return table.group_by("doc").aggregate([("component", "min")]).rename_columns(["doc", "component"]).sort_by("doc")


def _by_component(segment: Segment, labels: str, label_parts: int, parts: int, texts: bool) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        from modelyard.corpus import unit

        for table in _read(name):
            first, last = (pc.min(table["doc"]).as_py(), pc.max(table["doc"]).as_py())
            # A key file is that of one unit, and the labels of a unit are in one file.
            known = [t.filter(pc.and_(pc.greater_equal(t["doc"], first), pc.less_equal(t["doc"], last)))
                     for t in _read(join(labels, unit.part((first >> 32) % label_parts)))]  # fmt: skip
            if not known or not (found := pa.concat_tables(known)).num_rows:
                continue
            docs, wanted = table["doc"].to_numpy(), found["doc"].to_numpy()
            rows = np.flatnonzero(np.isin(docs, wanted))
            component = found["component"].to_numpy()[np.searchsorted(wanted, docs[rows])]
            some = table.take(pa.array(rows))
            if texts:
                some = some.append_column("text", unit.texts(segment.documents, docs[rows]))
            yield some.append_column("p", pa.array(component % parts))

    return mapper


def _decide(table: Any, options: MinHashOptions) -> Any:
    from modelyard.corpus.dedup import decide, decide_unseen

    if options.verify == "estimate":
        return decide_unseen(table, options)
    return decide(table.drop_columns(["text"]), table["text"], options)


def _by_unit(folder: str, keys: list[str], resources: Resources) -> dict[str, Any]:
    """Brings decisions to the units that apply them, and counts."""
    names = _names(join(folder, "found"))
    parts = max(1, min(1000, sum(size for _, size in list_files(join(folder, "found"))) // PARTITION_BYTES))
    removed = 0
    if names:

        def mapper(name: str) -> Iterator[Any]:
            import pyarrow as pa

            for table in _read(name):
                yield table.append_column("p", pa.array((table["doc"].to_numpy() >> 32) % parts))

        removed = shuffle(names, mapper, _sorted, join(folder, "decisions"), resources, parts).rows
    documents = sum(t.num_rows for name in keys for t in _read(name, ["doc"]))
    how = f"over {parts} partitions"
    return {"partitions": parts, "documents": documents, "removed": removed, "how": how}


def _sorted(table: Any) -> Any:
    return table.sort_by([(name, "ascending") for name in ("doc", "start") if name in table.column_names])
