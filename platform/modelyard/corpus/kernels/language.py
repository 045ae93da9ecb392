"""Language scores of documents: naive Bayes over byte n-grams that an automaton finds in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel

WINDOWS = 4  # places of a long document that are looked at: its head alone is often a menu


@kernel
def scores(data: Any, offsets: Any, most: Any, moves: Any, rows: Any, outputs: Any, table: Any, prior: Any) -> Any:
    """Log-posteriors up to a constant, tempered by length, as py3langid computes them.

    Args:
        data: uint8 [bytes of UTF-8].
        offsets: int64 [documents + 1].
        most: bytes of a document that are looked at: the whole, or WINDOWS equal parts spread over it.
        moves: uint32 [rows * 256], the next state.
        rows: uint16 [states], the row of `moves` that a state uses.
        outputs: int32 [states], the feature that a state completes, or -1.
        table: float32 [features, languages], log-probabilities.
        prior: float32 [languages].

    Returns:
        float32 [documents, languages]: scores / sqrt(bytes looked at), whose softmax is calibrated over
        lengths; 0 everywhere where no feature was seen.
    """
    documents, languages = len(offsets) - 1, len(prior)
    out = np.zeros((documents, languages), np.float32)
    counts = np.zeros(table.shape[0], np.int32)
    touched = np.empty(table.shape[0], np.int32)
    for d in range(documents):
        start, end = offsets[d], offsets[d + 1]
        parts = 1 if end - start <= most else WINDOWS
        length = end - start if parts == 1 else most // WINDOWS
        seen = 0
        for w in range(parts):
            at = start if parts == 1 else start + w * ((end - start - length) // (WINDOWS - 1))
            # A window begins with a character: continuation bytes of the one before are passed over.
            while at < end and data[at] & 0xC0 == 0x80:
                at += 1
            state = 0
            for i in range(at, min(at + length, end)):
                state = moves[(np.int64(rows[state]) << 8) + data[i]]
                feature = outputs[state]
                if feature >= 0:
                    if counts[feature] == 0:
                        touched[seen] = feature
                        seen += 1
                    counts[feature] += 1
        if seen == 0:
            continue
        scale = np.float32(1.0 / np.sqrt(length * parts))
        for k in range(seen):
            feature = touched[k]
            weight = np.float32(np.log1p(counts[feature])) * scale
            counts[feature] = 0
            for c in range(languages):
                out[d, c] += weight * table[feature, c]
        for c in range(languages):
            out[d, c] += prior[c] * scale
    return out
