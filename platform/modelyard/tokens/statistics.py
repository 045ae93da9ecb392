"""What a model must beat: the entropy of held-out text under token frequencies alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from modelyard.tokens.shards import Sequences

Counts = npt.NDArray[np.int64]


def token_counts(sequences: Sequences, vocab_size: int) -> Counts:
    """How often each id occurs, padding apart, int64 [vocab_size]."""
    real = np.arange(sequences.tokens.shape[1]) < sequences.lengths[:, None]
    return np.bincount(sequences.tokens[real], minlength=vocab_size).astype(np.int64)


def unigram_entropy(train: Counts, heldout: Counts) -> float:
    """Cross-entropy, in nats a token, of held-out tokens under the training set's token frequencies.

    With add-one smoothing over the V entries of the vocabulary, so an id never seen in training has
    a finite cost: -sum_t h_t ln((c_t + 1) / (N + V)) / sum_t h_t. It is the loss of the best model
    that knows frequencies and no context.

    Args:
        train: counts c [V], N in all.
        heldout: counts h [V], at least one.
    """
    probability = (train + 1) / (train.sum() + len(train))
    return float(-(heldout * np.log(probability)).sum() / heldout.sum())
