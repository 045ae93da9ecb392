"""Semantic deduplication as phases (SemDeDup, Abbas et al. 2023, arXiv:2303.09540).

    keys      a table of documents      -> doc, rank, id, vector     (in the pass that has the text)
    centres   a sample of vectors       -> centroids                 (one task)
    nearest   vectors                   -> the cluster of each       (shuffled by cluster)
    alike     one cluster's documents   -> doc, twin, cosine

A document goes when its cosine with one that stays, of the same cluster, reaches the threshold; what falls into
different clusters is never compared. Vectors are stored as 16-bit floats and compared as 32-bit ones. Memory: the
model and 32 documents in the first phase; the sample (at most 256 MB); one cluster of documents, 4 bytes a dimension,
and a thousand of its rows of similarities.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from modelyard.corpus.dedup import DECISIONS, Ints, ranks
from modelyard.corpus.dedup_options import SemanticOptions
from modelyard.errors import DataError

Vectors = npt.NDArray[np.float32]

SAMPLE_BYTES = 256_000_000
_SAMPLE_A_CLUSTER = 64
_BATCH = 32
_ROWS = 1024
_CHARS_A_TOKEN = 16
"""A text is cut to this many characters a token before it is tokenized: more cannot be in a token's worth of prose."""


class Embedder:
    """A sentence-embedding model on disk: mean of the last hidden states, scaled to length 1.

    A text without tokens has the zero vector: it is like nothing.

    Args:
        folder: config.json, safetensors and tokenizer, as `save_pretrained` writes them.
        max_tokens: tokens of a text that are read.

    Raises:
        DataError: transformers cannot open the folder.
    """

    def __init__(self, folder: str, max_tokens: int) -> None:
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, **local)
            self._model: Any = AutoModel.from_pretrained(folder, use_safetensors=True, **local).eval()
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            mend = "give a folder written by save_pretrained of a model and its tokenizer"
            raise DataError(f"the embedding model cannot be opened: {error}", place=folder, mend=mend) from error
        longest = getattr(self._model.config, "max_position_embeddings", max_tokens)
        self._max_tokens = min(max_tokens, longest)

    def __call__(self, texts: list[str]) -> Vectors:
        """Vectors [texts, dimensions] of length 1; texts of like length share a batch."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        rows: list[tuple[npt.NDArray[np.int64], Vectors]] = []
        for first in range(0, len(texts), _BATCH):
            chosen = order[first : first + _BATCH]
            rows.append((chosen, self._embed([texts[i][: self._max_tokens * _CHARS_A_TOKEN] for i in chosen])))
        out = np.zeros((len(texts), rows[0][1].shape[1] if rows else self._model.config.hidden_size), np.float32)
        for chosen, vectors in rows:
            out[chosen] = vectors
        return out

    def _embed(self, texts: list[str]) -> Vectors:
        import torch

        given = self._tokenizer(texts, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt")
        with torch.inference_mode():
            hidden = self._model(**given).last_hidden_state
            mask = given["attention_mask"][:, :, None].to(hidden.dtype)
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            scaled: Vectors = torch.nn.functional.normalize(mean, dim=1).float().numpy()
        return scaled


@lru_cache(maxsize=1)
def _embedder(folder: str, max_tokens: int) -> Embedder:
    return Embedder(folder, max_tokens)


def keys(table: Any, docs: Ints, options: SemanticOptions) -> Any:
    """A row for each document: doc, rank, bytes, id, vector (fixed-size list of 16-bit floats).

    Raises:
        DataError: the model cannot be opened.
    """
    vectors = _embedder(options.model, options.max_tokens)(table["text"].to_pylist())
    flat = pa.array(vectors.astype(np.float16).reshape(-1))
    return pa.table(
        {
            "doc": pa.array(docs),
            "rank": pa.array(ranks(table, options.keep)),
            "id": table["id"].combine_chunks(),
            "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )


def vectors_of(table: Any) -> Vectors:
    """The vectors of a key table, float32 [documents, dimensions], scaled to length 1 again."""
    column = table["vector"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks)
    flat = column.flatten().to_numpy(zero_copy_only=False)
    vectors = flat.astype(np.float32).reshape(len(column), column.type.list_size)
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9), np.float32)


def cluster_count(documents: int, options: SemanticOptions) -> int:
    """How many clusters so many documents are put in."""
    return min(max(documents, 1), options.clusters or max(1, round(documents**0.5 / 2)))


def sampled(docs: Ints, documents: int, clusters: int, dimensions: int, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents the clusters are made from: about 64 a cluster by a hash of the address, 256 MB at most."""
    most = min(_SAMPLE_A_CLUSTER * clusters, SAMPLE_BYTES // (4 * dimensions))
    words = (docs.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    share = (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(share < min(1.0, most / max(documents, 1)))


def centres(vectors: Vectors, clusters: int, iterations: int, seed: int) -> Vectors:
    """Centroids [clusters or fewer, dimensions] of length 1 by spherical k-means (Dhillon and Modha 2001).

    Starts from a draw of the vectors; a cluster that loses all its members keeps its centroid.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    found = vectors[np.sort(rng.permutation(len(vectors))[:clusters])].copy()
    for _ in range(iterations if len(found) > 1 else 0):
        owner = nearest(vectors, found)
        order = np.argsort(owner, kind="stable")
        filled, starts = np.unique(owner[order], return_index=True)
        sums = np.add.reduceat(vectors[order], starts, axis=0)
        moved = found.copy()
        moved[filled] = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-9)
        if np.array_equal(moved, found):
            break
        found = moved
    return found


def nearest(vectors: Vectors, centroids: Vectors) -> Ints:
    """The cluster of each vector, int64 [documents]: the centroid with the largest cosine.

    Cosines are rounded to 5 decimals before the largest is taken, so that it does not depend on how many
    vectors are multiplied at once.
    """
    parts = [
        np.argmax(np.round(vectors[i : i + _ROWS] @ centroids.T, 5), axis=1) for i in range(0, len(vectors), _ROWS)
    ]
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)


def alike(table: Any, options: SemanticOptions) -> Any:
    """Decisions on the documents of one cluster, in no particular order; the similarity given is the cosine."""
    from modelyard.corpus.kernels.cluster import remove_alike

    order = np.lexsort((table["doc"].to_numpy(), table["rank"].to_numpy()))
    table = table.take(pa.array(order))
    vectors = vectors_of(table)
    twin, cosine = np.full(len(vectors), -1, np.int64), np.zeros(len(vectors))
    for first in range(0, len(vectors), _ROWS):
        block = np.round(vectors[first : first + _ROWS] @ vectors[: first + _ROWS].T, 5)
        remove_alike(block, first, np.float32(options.cosine), twin, cosine)
    gone = np.flatnonzero(twin >= 0)
    docs, ids = table["doc"].to_numpy()[gone], table["id"].take(pa.array(twin[gone]))
    return pa.table([pa.array(docs), ids, pa.array(cosine[gone])], schema=DECISIONS).sort_by("doc")


def decide(table: Any, options: SemanticOptions) -> Any:
    """All phases after `keys` in one process."""
    if not table.num_rows:
        return DECISIONS.empty_table()
    vectors, docs = vectors_of(table), table["doc"].to_numpy()
    clusters = cluster_count(len(docs), options)
    some = sampled(docs, len(docs), clusters, vectors.shape[1], options.seed)
    sample = vectors[some][np.argsort(docs[some])] if some.any() else vectors[:1]
    owner = nearest(vectors, centres(sample, clusters, options.iterations, options.seed))
    parts = [alike(table.filter(pa.array(owner == c)), options) for c in np.unique(owner)]
    return pa.concat_tables(parts).sort_by("doc")
