"""A linear classifier over hashed words and word pairs: features, training and scores, straight from bytes.

A document is the set of its words and pairs of neighbours (the words of `minhash`), each hashed to one of
2 ** bits weights, at unit length: its score is the sum of its features' weights over the root of their number.
fastText (Joulin et al. 2016, arXiv:1607.01759) averages embeddings instead; for two classes that is a linear
function of the same features.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.minhash import _M, FOLD, _skip
from modelyard.corpus.kernels.text import PRIME, SEED, mix

Floats = npt.NDArray[np.float32]


@kernel
def features(data: Any, start: Any, end: Any, fold: Any, mask: Any, stamp: Any, mark: Any, out: Any) -> Any:
    """Writes the distinct features of data[start:end] to `out`; returns how many, at most 2 a word.

    `stamp` [2 ** bits] holds `mark` where a feature was seen in this document: marks must not repeat.
    """
    n, h, inside, before, i = 0, SEED, False, np.uint64(0), start
    while i <= end:
        byte, step = np.uint8(0), 1
        if i < end:
            byte = fold[data[i]]
            if byte >= 0x80:
                step = _skip(data, i, end)
            if (byte and byte < 0x80) or step == 0:
                h = (h ^ np.uint64(byte)) * PRIME
                inside = True
                i += 1
                continue
        for part in range(2):
            if part == 1:
                if step > 0:
                    break
                for j in range(i, i - step):
                    h = (h ^ np.uint64(data[j])) * PRIME
            elif not inside:
                continue
            single = np.int64(mix(h) & mask)
            if stamp[single] != mark:
                stamp[single] = mark
                out[n] = single
                n += 1
            if before:
                pair = np.int64(mix(before * _M + h) & mask)
                if stamp[pair] != mark:
                    stamp[pair] = mark
                    out[n] = pair
                    n += 1
            before, h = h, SEED
        inside = False
        i += step if step > 0 else -step
    return n


@kernel
def longest(offsets: Any) -> Any:
    """Bytes of the longest document."""
    size = 1
    for d in range(len(offsets) - 1):
        size = max(size, offsets[d + 1] - offsets[d])
    return size


@kernel
def extract(data: Any, offsets: Any, fold: Any, stamp: Any, out: Any, ends: Any) -> Any:
    """Features of all documents one after the other in `out` [at least bytes + documents]; `ends` where each ends."""
    mask, used = np.uint64(len(stamp) - 1), 0
    for d in range(len(offsets) - 1):
        used += features(data, offsets[d], offsets[d + 1], fold, mask, stamp, d + 1, out[used:])
        ends[d] = used
    return used


@kernel
def score(data: Any, offsets: Any, fold: Any, weights: Any, bias: Any, stamp: Any, out: Any) -> Any:
    """Writes the raw score (log odds) of each document; returns the number of features."""
    mask, total = np.uint64(len(weights) - 1), 0
    seen = np.empty(2 * longest(offsets) + 2, np.int64)
    for d in range(len(offsets) - 1):
        n = features(data, offsets[d], offsets[d + 1], fold, mask, stamp, d + 1, seen)
        value = 0.0
        for j in range(n):
            value += weights[seen[j]]
        out[d] = bias + (value / np.sqrt(n) if n else 0.0)
        total += n
    return total


@kernel
def epoch(order: Any, found: Any, ends: Any, labels: Any, scale: Any, rate: Any, weights: Any, squares: Any) -> Any:
    """One pass of AdaGrad (Duchi et al. 2011) on the logistic loss; the bias is the last weight. Returns the mean loss.

    Args:
        order: documents in the order of this pass.
        labels: 1 or 0; `scale` weighs each class's loss, [2].
        weights, squares: float32 [2 ** bits + 1], changed in place.
    """
    loss, last = 0.0, len(weights) - 1
    for place in range(len(order)):
        d = order[place]
        start = ends[d - 1] if d else 0
        n = ends[d] - start
        if n == 0:
            continue
        size = 1.0 / np.sqrt(n)
        value = 0.0
        for j in range(start, ends[d]):
            value += weights[found[j]]
        value = value * size + weights[last]
        p = 1.0 / (1.0 + np.exp(-value))
        label = labels[d]
        loss -= np.log(max(p if label else 1.0 - p, 1e-12))
        g = (p - label) * scale[label]
        for j in range(start, ends[d]):
            f = found[j]
            squares[f] += (g * size) ** 2
            weights[f] -= rate * g * size / np.sqrt(squares[f] + 1e-8)
        squares[last] += g * g
        weights[last] -= rate * g / np.sqrt(squares[last] + 1e-8)
    return loss / max(len(order), 1)


def scores(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64], weights: Floats, bias: float) -> Floats:
    """Raw scores of documents, float32 [documents]."""
    out = np.zeros(len(offsets) - 1, np.float32)
    score(data, offsets, FOLD, weights, bias, np.zeros(len(weights), np.int32), out)
    return out
