"""Deduplication over Ray Data's shuffle, for keys or candidates that one process should not hold.

    exact       keys -> by digest -> decisions -> by unit
    paragraphs  keys -> by digest -> spans -> by unit
    semantic    keys -> by cluster -> decisions -> by unit
    minhash     see `curate_clusters`; then -> by unit

The number of partitions follows from the data's size. Memory of a worker: one partition (about 64 MB of keys), or
one cluster of vectors, if that is larger.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from modelyard.corpus import semantic
from modelyard.corpus.dedup import equal, key_matrix
from modelyard.corpus.dedup_options import DedupMethod, ExactOptions, ParagraphOptions, SemanticOptions
from modelyard.corpus.paragraphs import repeated
from modelyard.recipe.schema import Resources
from modelyard.stages import curate_shuffle
from modelyard.stages.curate_clusters import minhash
from modelyard.stages.curate_shuffle import Mapper, by_table, files_in, rows_in, shuffle, to_units
from modelyard.storage import join, list_files, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.corpus.unit import Segment


def deduplicate(
    segment: Segment, options: DedupMethod, files: list[str], stored: int, resources: Resources
) -> dict[str, Any]:
    """Decisions by unit partition; see `curate_ray.deduplicate`."""
    folder = posixpath.dirname(segment.keys)
    keys = [join(segment.keys, name) for name in files]
    parts = max(1, min(1000, 2 * stored // curate_shuffle.PARTITION_BYTES + 1))
    found = join(folder, "found")
    if isinstance(options, ExactOptions):
        shuffle(keys, by_table(partial(_to_digests, parts=parts)), equal, found, resources, parts)
    elif isinstance(options, ParagraphOptions):
        shuffle(keys, by_table(partial(_to_digests, parts=parts)), repeated, found, resources, parts)
    elif isinstance(options, SemanticOptions):
        clusters = _centroids(folder, keys, options, resources)
        mapper = _by_cluster(join(folder, "centroids.npy"))
        shuffle(keys, mapper, partial(semantic.alike, options=options), found, resources, clusters)
    else:
        minhash(segment, options, keys, parts, resources)
    return _by_unit(folder, keys, resources)


def _to_digests(table: Any, parts: int) -> Any:
    return table.append_column("p", pa.array((key_matrix(table)[:, 0] % parts).astype("int64")))


def _centroids(folder: str, keys: list[str], options: SemanticOptions, resources: Resources) -> int:
    """Writes centroids.npy, made in one task from a sample, and returns how many clusters there are."""
    from modelyard.stages.curate_ray import each, rows_of

    item = {"files": json.dumps(keys), "to": join(folder, "centroids.npy")}
    return int(next(iter(rows_of(each([item], _fit, resources, options))))["clusters"])


def _fit(item: dict[str, Any], options: SemanticOptions) -> Iterator[Any]:
    names = json.loads(item["files"])
    documents = sum(table.num_rows for name in names for table in rows_in(name, ["doc"]))
    clusters = semantic.cluster_count(documents, options)
    sample, first = [], None
    for name in names:
        for table in rows_in(name, ["doc", "vector"]):
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
        found = np.load(io.BytesIO(read_bytes(centroids)), allow_pickle=False)
        for table in rows_in(name):
            yield table.append_column("p", pa.array(semantic.nearest(semantic.vectors_of(table), found)))

    return mapper


def _by_unit(folder: str, keys: list[str], resources: Resources) -> dict[str, Any]:
    """Brings decisions to the units that apply them, and counts."""
    names = files_in(join(folder, "found"))
    stored = sum(size for _, size in list_files(join(folder, "found")))
    parts = max(1, min(1000, stored // curate_shuffle.PARTITION_BYTES))
    removed = 0
    if names:
        mapper = by_table(partial(to_units, parts=parts))
        removed = shuffle(names, mapper, _sorted, join(folder, "decisions"), resources, parts).rows
    documents = sum(t.num_rows for name in keys for t in rows_in(name, ["doc"]))
    how = f"over {parts} partitions"
    return {"partitions": parts, "documents": documents, "removed": removed, "how": how}


def _sorted(table: Any) -> Any:
    return table.sort_by([(name, "ascending") for name in ("doc", "start") if name in table.column_names])
