"""Clusters of duplicates for the report: how large they are, and some beside the document that stayed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from modelyard.corpus.files import read_parquet
from modelyard.storage import join, list_files

_PARTS = 64  # files of the audit, and of the output, that are searched: bounds time and memory of the report
_LARGEST, _SHOWN, _BESIDE = 3, 6, 2
_CHARS = 1500


@dataclass
class Cluster:
    """A document that stayed, and some of those that went because of it."""

    twin: str
    size: int
    kept: str | None = None
    removed: list[dict[str, Any]] = field(default_factory=list)


def duplicate_clusters(output: str) -> tuple[Counter[int], list[Cluster], bool]:
    """(clusters by number of removed documents, examples, whether all of the audit was seen).

    Examples are the largest clusters and the ones whose removed documents are least like the kept one.
    """
    parts = [name for name, _ in list_files(join(output, "audit"))]
    seen = [join(output, "audit", name) for name in parts[:_PARTS]]
    columns = ["id", "twin", "reason", "jaccard", "text"]
    pieces = [t.filter(t["twin"].is_valid()) for uri in seen for t in read_parquet(uri, 1 << 16, columns=columns[:4])]
    if not pieces or not sum(piece.num_rows for piece in pieces):
        return Counter(), [], len(parts) <= _PARTS
    groups = pa.concat_tables(pieces).group_by("twin").aggregate([("id", "count"), ("jaccard", "min")])
    sizes = Counter({item["values"]: item["counts"] for item in pc.value_counts(groups["id_count"]).to_pylist()})
    chosen = _chosen(groups)
    for uri in seen:
        for table in read_parquet(uri, 1 << 14, columns=columns):
            for row in table.filter(pc.is_in(table["twin"], pa.array(list(chosen), pa.string()))).to_pylist():
                if len(chosen[row["twin"]].removed) < _BESIDE:
                    chosen[row["twin"]].removed.append(row)
    _find_kept(output, chosen)
    return sizes, list(chosen.values()), len(parts) <= _PARTS


def _chosen(groups: Any) -> dict[str, Cluster]:
    # The twin's id breaks ties, so that the page is the same whatever the order of the files.
    largest = groups.sort_by([("id_count", "descending"), ("twin", "ascending")]).slice(0, _LARGEST)
    least = groups.sort_by([("jaccard_min", "ascending"), ("twin", "ascending")]).slice(0, _SHOWN)
    rows = [*largest.to_pylist(), *least.to_pylist()]
    found = {row["twin"]: Cluster(row["twin"], row["id_count"]) for row in rows}
    return dict(list(found.items())[:_SHOWN])


def _find_kept(output: str, chosen: dict[str, Cluster]) -> None:
    """Sets the texts of the documents that stayed, as far as they are in the first parts of the output."""
    wanted = pa.array(list(chosen), pa.string())
    for name, _ in list(list_files(join(output, "data")))[:_PARTS]:
        for table in read_parquet(join(output, "data", name), 5000, columns=["id", "text"]):
            for row in table.filter(pc.is_in(table["id"], wanted)).to_pylist():
                chosen[row["id"]].kept = row["text"][:_CHARS]
        if all(cluster.kept is not None for cluster in chosen.values()):
            return
