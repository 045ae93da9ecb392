"""Who goes and who stays: bucket edges, connected components, and removal against kept documents only."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.minhash import jaccard


@kernel
def star_edges(keys: Any, members: Any) -> Any:
    """Edges from the smallest member of each bucket to the others.

    Args:
        keys: uint64 [n], sorted. Equal keys are one bucket.
        members: int64 [n], the document of each key.

    Returns:
        (small, large): int64 arrays; a bucket of k distinct documents gives k - 1 edges.
    """
    n = len(keys)
    small = np.empty(n, np.int64)
    large = np.empty(n, np.int64)
    used, i = 0, 0
    while i < n:
        j = i + 1
        lowest = members[i]
        while j < n and keys[j] == keys[i]:
            lowest = min(lowest, members[j])
            j += 1
        for m in range(i, j):
            if members[m] != lowest:
                small[used], large[used] = lowest, members[m]
                used += 1
        i = j
    return small[:used].copy(), large[:used].copy()


@kernel
def components(small: Any, large: Any, nodes: Any) -> Any:
    """Smallest node of each node's connected component (union-find with path halving), int64 [nodes]."""
    parent = np.arange(nodes)
    for e in range(len(small)):
        x, y = small[e], large[e]
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        while parent[y] != y:
            parent[y] = parent[parent[y]]
            y = parent[y]
        if x < y:
            parent[y] = x
        elif y < x:
            parent[x] = y
    for x in range(nodes):
        parent[x] = parent[parent[x]]
    return parent


@kernel
def _root(parent: Any, x: Any) -> Any:
    while parent[x] != x:
        parent[x] = parent[parent[x]]
        x = parent[x]
    return x


@kernel
def chain_verified(buckets: Any, values: Any, places: Any, threshold: Any) -> Any:
    """Joins documents that share a bucket and reach the threshold by exact Jaccard; the clusters' best members.

    Documents already joined are not compared again, and of documents with equal shingle sets only the first
    is compared with later ones (the others' similarities are the same).

    Args:
        buckets, values, places, threshold: as of `remove_verified`, rows in order of preference.

    Returns:
        the most preferred member of each document's cluster, int64 [documents].
    """
    documents, bands = buckets.shape
    top = -1
    for d in range(documents):
        for j in range(bands):
            top = max(top, buckets[d, j])
    head = np.full(top + 1, -1, np.int64)
    entry = np.empty(documents * bands, np.int64)
    link = np.empty(documents * bands, np.int64)
    parent = np.arange(documents)
    used = 0
    for d in range(documents):
        twin = False
        size = places[d + 1] - places[d]
        for j in range(bands):
            at = head[buckets[d, j]] if buckets[d, j] >= 0 else -1
            while at >= 0 and not twin:
                other = entry[at]
                at = link[at]
                x, y = _root(parent, d), _root(parent, other)
                length = places[other + 1] - places[other]
                if x == y or min(size, length) < threshold * max(size, length):
                    continue
                similarity = jaccard(values, places[d], places[d + 1], places[other], places[other + 1])
                if similarity >= threshold:
                    parent[max(x, y)] = min(x, y)
                    twin = similarity == 1.0
        if twin:
            continue
        for j in range(bands):
            bucket = buckets[d, j]
            if bucket >= 0:
                entry[used], link[used] = d, head[bucket]
                head[bucket] = used
                used += 1
    for d in range(documents):
        parent[d] = _root(parent, d)
    return parent


@kernel
def similarities(first: Any, second: Any, values: Any, places: Any) -> Any:
    """Exact Jaccard similarity of the documents first[i] and second[i], float64 [n]."""
    out = np.empty(len(first), np.float64)
    for i in range(len(first)):
        x, y = first[i], second[i]
        out[i] = jaccard(values, places[x], places[x + 1], places[y], places[y + 1])
    return out


@kernel
def _best(d: Any, kept: Any, values: Any, places: Any, threshold: Any, best: Any, winner: Any) -> Any:
    """Compares document d with one kept document; returns the better of (best, winner) and this."""
    size, other = places[d + 1] - places[d], places[kept + 1] - places[kept]
    # |A and B| <= min, |A or B| >= max: sets of too different size cannot reach the threshold.
    if min(size, other) < threshold * max(size, other):
        return best, winner
    similarity = jaccard(values, places[d], places[d + 1], places[kept], places[kept + 1])
    if similarity >= threshold and similarity > best:
        return similarity, kept
    return best, winner


@kernel
def remove_verified(buckets: Any, values: Any, places: Any, threshold: Any) -> Any:
    """Goes through documents in order of preference and removes each one similar to a kept one.

    A document is compared with the kept documents it shares a bucket with, by exact Jaccard of their
    shingle sets, and removed against the most similar one at or above the threshold. Nothing is ever
    removed against a document that was itself removed, so no chain of small steps can delete a text
    that has no near-copy left.

    Args:
        buckets: int64 [documents, bands], bucket numbers from 0; -1 = alone in its bucket. Rows come
            in order of preference.
        values, places: sorted shingle sets as of `shingle_sets`, in the same order.
        threshold: Jaccard similarity from which a document goes.

    Returns:
        (twin int64 [documents] or -1 = kept, jaccard float64 [documents], pairs compared).
    """
    documents, bands = buckets.shape
    top = -1
    for d in range(documents):
        for j in range(bands):
            top = max(top, buckets[d, j])
    head = np.full(top + 1, -1, np.int64)
    entry = np.empty(documents * bands, np.int64)
    link = np.empty(documents * bands, np.int64)
    used, compared = 0, 0
    seen = np.full(documents, -1, np.int64)
    twin = np.full(documents, -1, np.int64)
    similarity = np.zeros(documents, np.float64)
    for d in range(documents):
        best, winner = -1.0, np.int64(-1)
        for j in range(bands):
            bucket = buckets[d, j]
            at = head[bucket] if bucket >= 0 else -1
            while at >= 0:
                kept = entry[at]
                if seen[kept] != d:
                    seen[kept] = d
                    compared += 1
                    best, winner = _best(d, kept, values, places, threshold, best, winner)
                at = link[at]
        if winner >= 0:
            twin[d], similarity[d] = winner, best
            continue
        for j in range(bands):
            bucket = buckets[d, j]
            if bucket >= 0:
                entry[used], link[used] = d, head[bucket]
                head[bucket] = used
                used += 1
    return twin, similarity, compared


@kernel
def remove_alike(block: Any, first: Any, threshold: Any, twin: Any, cosine: Any) -> None:
    """Goes on with removal against kept rows, for rows first, first + 1, ... in order of preference.

    Args:
        block: float32 [rows, first + rows], similarities of these rows with all rows up to them.
        threshold: similarity from which a row goes.
        twin, cosine: int64 and float64 [documents], filled in: the most similar kept row (-1 = stays).
    """
    for r in range(block.shape[0]):
        d = first + r
        best = threshold
        for other in range(d):
            if twin[other] < 0 and block[r, other] >= best and (twin[d] < 0 or block[r, other] > best):
                best, twin[d], cosine[d] = block[r, other], other, block[r, other]
