"""From encoded documents to fixed-length sequences: split, order and packing, whole arrays at a time.

Where a document goes is decided by hashes of its id alone: which side of the split, which bucket
(one shard) and its place in it. So the shards do not depend on how the corpus was cut into files or
which worker encoded what, and documents of one source are spread over the stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from modelyard.tokens.shards import Sequences
from modelyard.tokens.tokenizer import Encoder

_SPLIT_SEED, _ORDER_SEED, _SAMPLE_SEED = 1, 2, 3
BUCKET_BYTES = 64 << 20
MAX_BUCKETS = 1024
"""Buckets are 64 MiB of text up to 64 GiB and then grow, so that encoded units x buckets stays countable."""


@dataclass(frozen=True)
class Buckets:
    """How documents are spread: `heldout` is the share held out; buckets 0..train-1 are for training."""

    heldout: float
    train: int
    held: int

    @classmethod
    def plan(cls, text_bytes: int, heldout: float) -> Buckets:
        """Buckets for a corpus of `text_bytes` UTF-8 bytes."""
        held = int(text_bytes * heldout)
        return cls(heldout, _buckets(text_bytes - held), _buckets(held))

    @property
    def total(self) -> int:
        return self.train + self.held

    def split(self, bucket: int) -> str:
        """The folder of a bucket: `train` or `heldout`."""
        return "train" if bucket < self.train else "heldout"

    def assign(self, ids: Sequence[str]) -> npt.NDArray[np.int64]:
        """The bucket of each document id, int64 [n]."""
        keys = order_keys(ids)
        held = unit_hashes(ids, _SPLIT_SEED) < self.heldout
        return np.where(held, self.train + keys % np.uint64(self.held), keys % np.uint64(self.train)).astype(np.int64)


def _buckets(text_bytes: int) -> int:
    return min(MAX_BUCKETS, max(1, -(-text_bytes // BUCKET_BYTES)))


def _hashes(ids: Sequence[str], seed: int) -> npt.NDArray[np.uint64]:
    return np.array([xxhash.xxh3_64_intdigest(i.encode(), seed=seed) for i in ids], dtype=np.uint64)


def order_keys(ids: Sequence[str]) -> npt.NDArray[np.uint64]:
    """The hash that orders documents within a bucket, uint64 [n]."""
    return _hashes(ids, _ORDER_SEED)


def unit_hashes(ids: Sequence[str], seed: int = _SAMPLE_SEED) -> npt.NDArray[np.float64]:
    """A hash of each id as a number in [0, 1), float64 [n]."""
    # 53 bits: what a double holds exactly, so that the result never rounds up to 1.
    return (_hashes(ids, seed) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def in_sample(ids: Sequence[str], share: float, heldout: float) -> npt.NDArray[np.bool_]:
    """Which documents a tokenizer is trained on: a random share of those not held out, bool [n]."""
    return (unit_hashes(ids) < share) & (unit_hashes(ids, _SPLIT_SEED) >= heldout)


def encode_table(documents: pa.Table, encoder: Encoder, buckets: Buckets) -> pa.Table:
    """Encodes documents.

    Args:
        documents: columns `id` and `text`; documents without text are left out.
        encoder: the tokenizer.
        buckets: how documents are spread.

    Returns:
        one row a document: `bucket` int64, `key` uint64, `id` string, `bytes` int64 (UTF-8 bytes of
        text) and `tokens` large_list<uint16 or uint32>, the end token last.
    """
    texts = documents["text"].to_pylist()
    ids = documents["id"].to_pylist()
    chosen = [i for i, text in enumerate(texts) if text]
    texts, ids = [texts[i] for i in chosen], [ids[i] for i in chosen]
    flat, lengths = encoder.encode(texts)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return pa.table(
        {
            "bucket": buckets.assign(ids),
            "key": order_keys(ids),
            "id": pa.array(ids, pa.string()),
            "bytes": pc.binary_length(pa.array(texts, pa.large_string())).cast(pa.int64()),
            "tokens": pa.LargeListArray.from_arrays(offsets, pa.array(flat)),
        }
    )


def by_bucket(encoded: pa.Table, total: int) -> list[pa.Table]:
    """The rows of each bucket 0..total-1, in their present order."""
    column = encoded["bucket"].to_numpy()
    order = np.argsort(column, kind="stable")
    ordered = encoded.take(order).drop_columns("bucket")
    ends = np.searchsorted(column[order], np.arange(total), side="right")
    starts = np.concatenate([[0], ends[:-1]])
    return [ordered.slice(int(a), int(b - a)) for a, b in zip(starts, ends, strict=True)]


def pack_table(encoded: pa.Table, sequence_length: int, pad_id: int, keep_tail: bool) -> Sequences:
    """Orders the documents of one bucket by their key and packs them.

    Args:
        encoded: rows of :func:`encode_table`.
        sequence_length: tokens in a sequence, L.
        pad_id: fills the last sequence.
        keep_tail: keep the last sequence when it is not full, padded; else leave it out.
    """
    ordered = encoded.sort_by([("key", "ascending"), ("id", "ascending")])
    column = ordered["tokens"].combine_chunks()
    lengths = column.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    return pack(column.flatten().to_numpy(), lengths, sequence_length, pad_id, keep_tail)


def pack(
    tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], sequence_length: int, pad_id: int, keep_tail: bool
) -> Sequences:
    """Cuts a stream of documents into sequences of equal length; documents run on from one to the next.

    Args:
        tokens: ids of all documents, one after the other, [sum(lengths)].
        lengths: ids in each document, all positive, [documents].
        sequence_length: tokens in a sequence, L.
        pad_id: fills the last sequence.
        keep_tail: keep the last sequence when it is not full, padded; else leave it out.
    """
    total = len(tokens)
    rows = -(-total // sequence_length) if keep_tail else total // sequence_length
    size = rows * sequence_length
    stream = np.full(size, pad_id, dtype=tokens.dtype)
    stream[:total] = tokens[:size]
    starts = np.zeros(size, dtype=np.bool_)
    first = np.cumsum(lengths) - lengths
    starts[first[first < size]] = True
    filled = np.minimum(total - np.arange(rows) * sequence_length, sequence_length)
    shape = (rows, sequence_length)
    return Sequences(stream.reshape(shape), starts.reshape(shape), filled)
