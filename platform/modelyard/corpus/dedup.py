"""Deduplication as phases: keys of each document, then decisions on documents that share a key.

    keys      a table of documents         -> doc, rank, id, keys      (in the pass that has the text)
    buckets   keys that share a partition  -> edges between documents  (shuffled by key)
    component edges                        -> doc, component           (see `corpus.stars` for many)
    decide    one component's documents    -> doc, twin, jaccard       (shuffled by component)

Each phase is a pure function on Arrow tables; the stage runs them over Ray Data's shuffle, or all at
once where everything fits in one process. `doc` is a 64-bit address: unit << 32 | row in that unit.
Verification compares exact sets of 64-bit shingle hashes, 8 bytes a distinct word, and holds one
component at a time, so memory is bounded by the largest component of candidates.
"""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.corpus.arrow import buffers, lengths
from modelyard.corpus.dedup_options import ExactOptions, MinHashOptions

Ints = npt.NDArray[np.int64]

DECISIONS = pa.schema([("doc", pa.int64()), ("twin", pa.string()), ("jaccard", pa.float64())])


def address(unit: int, rows: int, first: int = 0) -> Ints:
    """Addresses of `rows` consecutive documents of a unit, from row `first` on."""
    return (np.int64(unit) << 32) + np.arange(first, first + rows, dtype=np.int64)


def permutations(options: MinHashOptions) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Multipliers (odd, so that each permutes 32-bit numbers) and offsets from the seed."""
    rng = np.random.Generator(np.random.PCG64(options.seed))
    a = rng.integers(0, 2**31, options.permutations, dtype=np.int64) * 2 + 1
    return a.astype(np.uint32), rng.integers(0, 2**32, options.permutations, dtype=np.int64).astype(np.uint32)


def ranks(table: Any, keep: str) -> npt.NDArray[np.float64]:
    """How much a document is preferred by the rule `keep`: smaller is better, ties go to the earlier document."""
    if keep == "longest":
        return -lengths(table["text"]).astype(np.float64)
    if keep == "quality":
        return -np.asarray(table["quality"].to_numpy(), np.float64)
    return np.zeros(table.num_rows)


def keys(table: Any, docs: Ints, options: ExactOptions | MinHashOptions) -> Any:
    """Keys of a table of documents: doc, rank, bytes, id, keys (list of uint64).

    Exact: two halves of a 128-bit BLAKE2b digest. MinHash: one key a band. Documents without any
    shingle have nothing to compare and are left out.
    """
    order = ranks(table, options.keep)
    if isinstance(options, ExactOptions):
        values, some = _digests(table["text"]), np.ones(table.num_rows, bool)
    else:
        values, some = _bands(table["text"], options)
    width = values.shape[1]
    flat = pa.array(np.ascontiguousarray(values[some]).reshape(-1))
    columns = {
        "doc": pa.array(docs[some]),
        "rank": pa.array(order[some]),
        "bytes": pa.array(lengths(table["text"])[some]),
        "id": table["id"].combine_chunks().filter(pa.array(some)),
        "keys": pa.FixedSizeListArray.from_arrays(flat, width),
    }
    return pa.table(columns)


def _digests(text: Any) -> npt.NDArray[np.uint64]:
    data, offsets = buffers(text)
    view = data.data
    places = offsets.tolist()
    digests = b"".join(hashlib.blake2b(view[a:b], digest_size=16).digest() for a, b in itertools.pairwise(places))
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def _bands(text: Any, options: MinHashOptions) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    from modelyard.corpus.kernels import minhash

    data, offsets = buffers(text)
    characters = options.shingle == "character"
    values, counts = minhash.signatures(data, offsets, options.length, characters, minhash.FOLD, *permutations(options))
    return minhash.band_keys(values, *options.bands), counts > 0


def key_matrix(table: Any) -> npt.NDArray[np.uint64]:
    """The keys of a key table as [documents, keys]."""
    column = table["keys"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    return np.asarray(column.flatten().to_numpy(), np.uint64).reshape(len(column), column.type.list_size)


def equal(table: Any) -> Any:
    """Decisions of exact deduplication on a key table: all but the best of equal digests go."""
    matrix = key_matrix(table)
    docs, ranks = table["doc"].to_numpy(), table["rank"].to_numpy()
    order = np.lexsort((docs, ranks, matrix[:, 1], matrix[:, 0]))
    matrix = matrix[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (matrix[1:] != matrix[:-1]).any(axis=1)
    best = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
    gone, kept = order[~fresh], best[~fresh]
    return _decisions(docs[gone], table["id"].take(pa.array(kept)), np.ones(len(gone)))


def _decisions(docs: Ints, twins: Any, similarity: npt.NDArray[np.float64]) -> Any:
    table = pa.table([pa.array(docs), twins, pa.array(similarity)], schema=DECISIONS)
    return table.sort_by("doc")


def shared_buckets(matrix: npt.NDArray[np.uint64]) -> Ints:
    """Bucket numbers [documents, bands] from band keys; -1 where a document is alone in its bucket."""
    out = np.full(matrix.shape, -1, np.int64)
    used = 0
    for band in range(matrix.shape[1]):
        _, inverse, counts = np.unique(matrix[:, band], return_inverse=True, return_counts=True)
        crowded = counts > 1
        numbers = np.where(crowded, used + np.cumsum(crowded) - 1, -1)
        out[:, band] = numbers[inverse]
        used += int(crowded.sum())
    return out


def candidates(table: Any) -> Any:
    """The rows of a key table that share a bucket with another document."""
    some = (shared_buckets(key_matrix(table)) >= 0).any(axis=1)
    return table.filter(pa.array(some))


def decide(table: Any, text: Any, options: MinHashOptions) -> Any:
    """Decisions on candidates, whose `text` comes in the same order as the rows of the key table.

    `kept`: goes through them from the most to the least preferred one; a document goes when a kept document in
    one of its buckets has an exact Jaccard similarity of at least `options.jaccard`. `chain`: see
    `cluster.chain_verified`; the similarity given is the exact one to the document that stays.
    """
    from modelyard.corpus.kernels import cluster, minhash

    table, text = _preferred(table, text)
    data, offsets = buffers(text)
    characters = options.shingle == "character"
    values, places = minhash.shingle_sets(data, offsets, options.length, characters, minhash.FOLD)
    buckets = shared_buckets(key_matrix(table))
    if options.verify == "chain":
        roots = cluster.chain_verified(buckets, values, places, options.jaccard)
        gone = np.flatnonzero(roots != np.arange(len(roots)))
        kept, similarity = roots[gone], cluster.similarities(gone, roots[gone], values, places)
    else:
        twins, found, _ = cluster.remove_verified(buckets, values, places, options.jaccard)
        gone = np.flatnonzero(twins >= 0)
        kept, similarity = twins[gone], found[gone]
    return _decisions(table["doc"].to_numpy()[gone], table["id"].take(pa.array(kept)), similarity)


def _preferred(table: Any, text: Any = None) -> tuple[Any, Any]:
    """Both in order of preference."""
    order = pa.array(np.lexsort((table["doc"].to_numpy(), table["rank"].to_numpy())))
    return table.take(order), None if text is None else text.take(order)


def decide_unseen(table: Any, options: MinHashOptions) -> Any:
    """Decisions of `verify: estimate` on candidates: of documents linked by bands, all but the best go.

    The similarity given is an estimate from the share f of equal bands of r rows with the document that stays,
    f ** (1 / r): a band is equal with probability J ** r.
    """
    from modelyard.corpus.kernels import cluster

    table, _ = _preferred(table)
    matrix = key_matrix(table)
    numbers = shared_buckets(matrix)
    docs, bands = np.nonzero(numbers >= 0)
    buckets = numbers[docs, bands].astype(np.uint64)
    order = np.argsort(buckets, kind="stable")
    small, large = cluster.star_edges(buckets[order], docs[order].astype(np.int64))
    roots = cluster.components(small, large, len(matrix))
    gone = np.flatnonzero(roots != np.arange(len(roots)))
    share = (matrix[gone] == matrix[roots[gone]]).mean(axis=1) if len(gone) else np.zeros(0)
    ids = table["id"].take(pa.array(roots[gone]))
    return _decisions(table["doc"].to_numpy()[gone], ids, share ** (1 / options.bands[1]))


def edges(table: Any) -> Any:
    """Edges of the buckets in one partition of (key uint64, doc int64): a star around each smallest document."""
    from modelyard.corpus.kernels.cluster import star_edges
    from modelyard.corpus.stars import distinct

    order = np.argsort(table["key"].to_numpy(), kind="stable")
    small, large = star_edges(table["key"].to_numpy()[order], table["doc"].to_numpy()[order])
    return distinct(small, large)


def components(small: Ints, large: Ints) -> Any:
    """doc, component of every document on an edge: the component is its smallest document. 40 bytes an edge."""
    from modelyard.corpus.kernels.cluster import components as join

    docs, inverse = np.unique(np.concatenate([small, large]), return_inverse=True)
    roots = join(inverse[: len(small)], inverse[len(small) :], len(docs))
    return pa.table({"doc": pa.array(docs), "component": pa.array(docs[roots])})
