"""Connected components of more edges than one process holds, by alternating stars (Kiveris et al. 2014).

"Connected Components in MapReduce and Beyond" (SoCC 2014). An edge joins two documents; a round has two steps:

    large star  every node v links its larger neighbours to the smallest node m among its neighbours and itself
    small star  every node v links its smaller neighbours and itself to the smallest of them

Each step needs a node's neighbours together and nothing else: a shuffle by node. Components never change, edges
move towards the smallest node, and after about log2 of the longest path rounds each component is a star around
its smallest node: a round changes nothing any more. `total` tells, from sums over partitions.

Memory of a step: 40 bytes an edge of one partition. A node's neighbours are never split over partitions, so
the largest component's edges to its smallest node are held together as well.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]

EDGES = pa.schema([("small", pa.int64()), ("large", pa.int64())])


def spread(docs: Ints, parts: int) -> Ints:
    """The partition of each node, 0..parts-1: a hash, for addresses of neighbours in the input are close."""
    words = docs.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return ((words >> np.uint64(33)) % np.uint64(parts)).astype(np.int64)


def around_both(edges: Any, parts: int) -> Any:
    """Rows node, neighbour, p for a large star: each edge (columns small, large) at both of its ends."""
    small, large = edges["small"].to_numpy(), edges["large"].to_numpy()
    return _rows(np.concatenate([small, large]), np.concatenate([large, small]), parts)


def around_large(edges: Any, parts: int) -> Any:
    """Rows node, neighbour, p for a small star: each edge at its larger end."""
    return _rows(edges["large"].to_numpy(), edges["small"].to_numpy(), parts)


def _rows(node: Ints, neighbour: Ints, parts: int) -> Any:
    return pa.table({"node": node, "neighbour": neighbour, "p": spread(node, parts)})


def large_star(rows: Any) -> Any:
    """The edges (small, large), distinct and sorted, that a large star makes of rows node, neighbour."""
    if not rows.num_rows:
        return EDGES.empty_table()
    node, neighbour, lowest, _ = _grouped(rows)
    larger = neighbour > node
    return distinct(lowest[larger], neighbour[larger])


def small_star(rows: Any) -> Any:
    """The edges that a small star makes; rows come from `around_large`."""
    if not rows.num_rows:
        return EDGES.empty_table()
    node, neighbour, lowest, starts = _grouped(rows)
    others = neighbour != lowest
    small = np.concatenate([lowest[others], lowest[starts]])
    return distinct(small, np.concatenate([neighbour[others], node[starts]]))


def _grouped(rows: Any) -> tuple[Ints, Ints, Ints, Ints]:
    """Rows sorted by node, the smallest of node and neighbours at each row, and where each node's rows begin."""
    node, neighbour = rows["node"].to_numpy(), rows["neighbour"].to_numpy()
    order = np.argsort(node, kind="stable")
    node, neighbour = node[order], neighbour[order]
    starts = np.flatnonzero(np.concatenate([[True], node[1:] != node[:-1]]))
    lowest = np.minimum(np.minimum.reduceat(neighbour, starts), node[starts])
    return node, neighbour, np.repeat(lowest, np.diff(np.append(starts, len(node)))), starts


def distinct(small: Ints, large: Ints) -> Any:
    """Edges without repeats, sorted; 40 bytes an edge."""
    pairs = np.unique(np.stack([small, large], axis=1), axis=0) if len(small) else np.zeros((0, 2), np.int64)
    return pa.table([pa.array(pairs[:, 0]), pa.array(pairs[:, 1])], schema=EDGES)


def total(edges: Any) -> int:
    """A sum of hashes of the edges modulo 2**63: two sets of edges have the same sum when they are equal.

    Sums of partitions add up. (Unequal sets share a sum with probability 2**-63.)
    """
    words = edges["small"].to_numpy().astype(np.uint64) * np.uint64(0x9FB21C651E98DF25)
    words ^= words >> np.uint64(29)
    words = (words + edges["large"].to_numpy().astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(32)
    return int(words.sum(dtype=np.uint64)) & ((1 << 63) - 1)


def labels(edges: Any) -> Any:
    """Rows doc, component of stars: every large node, and the small ones themselves."""
    small, large = edges["small"].to_numpy(), edges["large"].to_numpy()
    roots = np.unique(small)
    return pa.table({"doc": np.concatenate([large, roots]), "component": np.concatenate([small, roots])})
