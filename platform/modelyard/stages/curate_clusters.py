"""Near-copies over Ray Data's shuffle: from band keys to clusters of candidates to decisions.

    band keys -> by key -> edges -> components -> candidates' texts -> by component -> decisions

Memory of a worker: one partition of keys, or the texts of one component of candidates, if that is larger. Components
of up to 10 million edges (40 bytes each) are found in one task; more of them by alternating stars (`corpus.stars`),
a shuffle a step.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus import dedup, stars
from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.recipe.schema import Resources
from modelyard.stages import curate_shuffle
from modelyard.stages.curate_shuffle import Mapper, Written, by_table, files_in, rows_in, shuffle, to_units
from modelyard.storage import exists, join, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.corpus.unit import Segment

MAX_EDGES = 10_000_000


def minhash(segment: Segment, options: MinHashOptions, keys: list[str], parts: int, resources: Resources) -> None:
    """Writes found/part-*: the decisions on all candidates, by component."""
    folder = posixpath.dirname(segment.keys)
    edges = shuffle(keys, _by_band(parts), dedup.edges, join(folder, "edges"), resources, parts, stars.total)
    labels = _components(folder, edges, resources)
    mapper = _by_component(segment, join(folder, "labels"), labels, parts, texts=options.verify != "estimate")
    shuffle(keys, mapper, partial(_decide, options=options), join(folder, "found"), resources, parts)


def _by_band(parts: int) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        for table in rows_in(name, ["doc", "keys"]):
            matrix = dedup.key_matrix(table)
            flat = matrix.reshape(-1)
            docs = np.repeat(table["doc"].to_numpy(), matrix.shape[1])
            yield pa.table({"key": flat, "doc": docs, "p": (flat % parts).astype("int64")})

    return mapper


def _components(folder: str, edges: Written, resources: Resources) -> int:
    """Writes labels/part-*: doc, component, of all documents on an edge; returns over how many files, by unit."""
    from modelyard.stages.curate_ray import each, rows_of

    if edges.rows <= MAX_EDGES:
        for _ in rows_of(each([{"folder": folder}], _label, resources)):
            pass
        return 1
    parts = max(2, min(1000, 16 * edges.rows // curate_shuffle.PARTITION_BYTES))
    names = files_in(_stars(folder, edges, resources, parts))
    shuffle(names, by_table(partial(_label_units, parts=parts)), _unique, join(folder, "labels"), resources, parts)
    return parts


def _label(item: dict[str, Any]) -> Iterator[Any]:
    from modelyard.corpus.files import write_parquet
    from modelyard.corpus.unit import part

    tables = [table for name in files_in(join(item["folder"], "edges")) for table in rows_in(name)]
    edges = pa.concat_tables(tables or [stars.EDGES.empty_table()])
    labels = dedup.components(edges["small"].to_numpy(), edges["large"].to_numpy())
    write_parquet(join(item["folder"], "labels", part(0)), labels)
    yield pa.table({"documents": [labels.num_rows]})


def _stars(folder: str, edges: Written, resources: Resources, parts: int) -> str:
    """The folder with the edges of stars, one a component, that rounds of large and small stars come to."""
    from modelyard.storage import remove

    state: dict[str, Any] = {"at": "edges", "turn": 0, "total": edges.total}
    place = join(folder, "stars.json")
    if exists(place):
        state = json.loads(read_bytes(place))
    both, one = (by_table(partial(ends, parts=parts)) for ends in (stars.around_both, stars.around_large))
    while True:
        turn, at = state["turn"], state["at"]
        large, small = join(folder, f"large-{turn}"), join(folder, f"small-{turn}")
        shuffle(files_in(join(folder, at)), both, stars.large_star, large, resources, parts)
        done = shuffle(files_in(large), one, stars.small_star, small, resources, parts, stars.total)
        if done.total == state["total"]:
            return small
        state = {"at": f"small-{turn}", "turn": turn + 1, "total": done.total}
        write_bytes(place, json.dumps(state).encode())
        for old in (large, *([join(folder, at)] if turn else [])):
            remove(old)


def _label_units(table: Any, parts: int) -> Any:
    return to_units(stars.labels(table), parts)


def _unique(table: Any) -> Any:
    return table.group_by("doc").aggregate([("component", "min")]).rename_columns(["doc", "component"]).sort_by("doc")


def _by_component(segment: Segment, labels: str, label_parts: int, parts: int, texts: bool) -> Mapper:
    def mapper(name: str) -> Iterator[Any]:
        from modelyard.corpus import unit

        for table in rows_in(name):
            first, last = (pc.min(table["doc"]).as_py(), pc.max(table["doc"]).as_py())
            # A key file is that of one unit, and the labels of a unit are in one file.
            known = [t.filter(pc.and_(pc.greater_equal(t["doc"], first), pc.less_equal(t["doc"], last)))
                     for t in rows_in(join(labels, unit.part((first >> 32) % label_parts)))]  # fmt: skip
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
    if options.verify == "estimate":
        return dedup.decide_unseen(table, options)
    return dedup.decide(table.drop_columns(["text"]), table["text"], options)
