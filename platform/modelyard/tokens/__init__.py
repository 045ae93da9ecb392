"""Tokens: the tokenizer, packing into fixed-length sequences, shards on disk, and the order they are read in.

A core: it may import `storage` and `errors`, never Ray, MLflow or torch. `TokenDataset` is the only
reader of shards, `global_batch_indices` the only order, so training resumes on the exact next batch.
"""

from modelyard.tokens.mixture import MixtureOrder
from modelyard.tokens.order import global_batch_indices, permute, rank_slice, stream_indices
from modelyard.tokens.ranges import open_in_place
from modelyard.tokens.shards import Sequences, Source, TokenDataset, TokenWriter

__all__ = [
    "MixtureOrder",
    "Sequences",
    "Source",
    "TokenDataset",
    "TokenWriter",
    "global_batch_indices",
    "open_in_place",
    "permute",
    "rank_slice",
    "stream_indices",
]
