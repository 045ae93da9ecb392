"""MinHash signatures, band keys and shingle sets straight from UTF-8 bytes (Broder 1997).

Words are runs of ASCII letters, digits and underscores (letters folded to lower case) and of bytes of
other scripts; ASCII punctuation, general punctuation (U+2000-206F), Latin-1 signs (U+0080-00BF) and
CJK punctuation separate them; every kana, Han or other code point of U+3040-9FFF is a word of its own,
for these scripts do not put blanks between words. Character shingles take every code point, with runs
of blanks as one blank.

The shingle hashes of a document are collected first and every permutation then runs over them: that
inner loop is a multiply, an add and a minimum over uint32, which LLVM turns into AVX2 (five times
faster than permutations in the inner loop).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.text import PRIME, SEED, mix

_TILE = 4096  # shingles a pass: 16 KiB stays in the L1 cache while all permutations run over it
_M = np.uint64(0x9FB21C651E98DF25)


def _fold_table() -> npt.NDArray[np.uint8]:
    """Lower-case byte for bytes of words, 0 for ASCII separators."""
    table = np.zeros(256, np.uint8)
    for char in b"abcdefghijklmnopqrstuvwxyz0123456789_":
        table[char] = char
        if 97 <= char <= 122:
            table[char - 32] = char
    table[128:] = np.arange(128, 256)
    return table


FOLD = _fold_table()


@kernel
def _skip(data: Any, i: Any, end: Any) -> Any:
    """At a byte >= 0x80: length of the separator there (0 = none), negative = length of a one-character word."""
    lead = data[i]
    if lead == 0xC2:
        return min(2, end - i)
    if lead == 0xE2 and i + 2 < end and data[i + 1] <= 0x81:
        return 3
    if lead == 0xE3 and i + 2 < end and data[i + 1] == 0x80:
        return 3
    if 0xE3 <= lead <= 0xE9 and i + 2 < end:
        return -3
    return 0


@kernel
def _powers(n: Any) -> Any:
    """_M ** n modulo 2 ** 64: the weight of the word that leaves a rolling window of n."""
    p = np.uint64(1)
    for _ in range(n):
        p *= _M
    return p


@kernel
def _roll(out: Any, count: Any, n: Any) -> Any:
    """Turns `count` word hashes in `out` into the hashes of their n-grams, in place; returns how many."""
    if count == 0:
        return 0
    top = _powers(n)
    rolling = np.uint64(0)
    for j in range(min(count, n)):
        rolling = rolling * _M + out[j]
    if count <= n:
        out[0] = mix(rolling)
        return 1
    for k in range(count - n):
        leaving = out[k]
        out[k] = mix(rolling)
        rolling = rolling * _M + out[k + n] - leaving * top
    out[count - n] = mix(rolling)
    return count - n + 1


@kernel
def word_shingles(data: Any, start: Any, end: Any, n: Any, fold: Any, out: Any) -> Any:
    """Writes the 64-bit hashes of all word n-grams of data[start:end] to `out`; returns how many.

    A text of fewer than n words is one shingle; a text without words has none. `out` must hold
    end - start + 1 values.

    ASCII goes without a branch: where words end cannot be predicted, and a wrong guess costs as much as
    four bytes. So the hash so far is written at every byte, and only the place moves on.
    """
    count: Any = 0
    inside: Any = 0
    h: Any = SEED
    i = start
    while i < end:
        byte = fold[data[i]]
        if byte < 0x80:
            out[count] = h
            gap = np.int64(byte == 0)
            count += gap & inside
            h = SEED if gap else (h ^ np.uint64(byte)) * PRIME
            inside = 1 - gap
            i += 1
            continue
        step = _skip(data, i, end)
        if step == 0:
            h = (h ^ np.uint64(byte)) * PRIME
            inside = 1
            i += 1
            continue
        if inside:
            out[count] = h
            count += 1
            h, inside = SEED, 0
        if step < 0:
            step = -step
            for j in range(i, i + step):
                h = (h ^ np.uint64(data[j])) * PRIME
            out[count] = h
            count += 1
            h = SEED
        i += step
    if inside:
        out[count] = h
        count += 1
    return _roll(out, count, n)


@kernel
def character_shingles(data: Any, start: Any, end: Any, n: Any, fold: Any, out: Any) -> Any:
    """The same for n-grams of code points; runs of ASCII white space count as one blank."""
    count, blank = 0, True
    i = start
    while i < end:
        byte = data[i]
        j = i + 1
        if byte == 0x20 or (0x09 <= byte <= 0x0D):
            if not blank:
                out[count] = SEED
                count += 1
            blank = True
            i = j
            continue
        blank = False
        h = (SEED ^ np.uint64(fold[byte] if fold[byte] else byte)) * PRIME
        while j < end and (data[j] & 0xC0) == 0x80:
            h = (h ^ np.uint64(data[j])) * PRIME
            j += 1
        out[count] = h
        count += 1
        i = j
    return _roll(out, count, n)


@kernel
def _shingles(data: Any, start: Any, end: Any, n: Any, fold: Any, characters: Any, out: Any) -> Any:
    if characters:
        return character_shingles(data, start, end, n, fold, out)
    return word_shingles(data, start, end, n, fold, out)


@kernel
def minima(values: Any, a: Any, b: Any, out: Any) -> None:
    """Minimum of each permutation x -> a x + b (mod 2^32) over the shingle hashes `values`."""
    for p in range(len(a)):
        ap, bp = a[p], b[p]
        best = out[p]
        for i in range(len(values)):
            v = np.uint32(values[i] * ap + bp)
            best = min(best, v)
        out[p] = best


@kernel
def _reduce(hashes: Any, k: Any, tile: Any, a: Any, b: Any, lows: Any) -> None:
    lows[:] = np.uint32(0xFFFFFFFF)
    for first in range(0, k, len(tile)):
        size = min(len(tile), k - first)
        for i in range(size):
            tile[i] = np.uint32(hashes[first + i] >> np.uint64(32))
        minima(tile[:size], a, b, lows)


@kernel
def signatures(data: Any, offsets: Any, n: Any, characters: Any, fold: Any, a: Any, b: Any) -> Any:
    """MinHash values [documents, permutations] (uint32) and shingle counts [documents].

    A document without shingles has a count of 0 and all-ones values.
    """
    documents = len(offsets) - 1
    longest = 0
    for d in range(documents):
        longest = max(longest, offsets[d + 1] - offsets[d])
    hashes = np.empty(longest + 1, np.uint64)
    tile = np.empty(_TILE, np.uint32)
    out = np.empty((documents, len(a)), np.uint32)
    counts = np.zeros(documents, np.int64)
    for d in range(documents):
        k = _shingles(data, offsets[d], offsets[d + 1], n, fold, characters, hashes)
        counts[d] = k
        _reduce(hashes, k, tile, a, b, out[d])
    return out, counts


@kernel
def band_keys(signature: Any, bands: Any, rows: Any) -> Any:
    """One 64-bit key a band [documents, bands]: equal keys = equal minima in that band."""
    documents = signature.shape[0]
    out = np.empty((documents, bands), np.uint64)
    for d in range(documents):
        for j in range(bands):
            h = SEED + np.uint64(j)
            for r in range(rows):
                h = (h ^ np.uint64(signature[d, j * rows + r])) * _M
                h ^= h >> np.uint64(32)
            out[d, j] = mix(h)
    return out


@kernel
def shingle_sets(data: Any, offsets: Any, n: Any, characters: Any, fold: Any) -> Any:
    """Distinct shingle hashes of every document, sorted, one after the other: (values, offsets)."""
    documents = len(offsets) - 1
    total, longest = 0, 0
    for d in range(documents):
        size = offsets[d + 1] - offsets[d]
        total += size + 1
        longest = max(longest, size)
    # A shingle takes at least a byte and its separator, except at one-character words: grow when needed.
    values = np.empty(total // 4 + 16, np.uint64)
    hashes = np.empty(longest + 1, np.uint64)
    places = np.zeros(documents + 1, np.int64)
    used = 0
    for d in range(documents):
        k = _shingles(data, offsets[d], offsets[d + 1], n, fold, characters, hashes)
        if used + k > len(values):
            bigger = np.empty(max(2 * len(values), used + k), np.uint64)
            bigger[:used] = values[:used]
            values = bigger
        part = np.sort(hashes[:k])
        for i in range(k):
            if i == 0 or part[i] != part[i - 1]:
                values[used] = part[i]
                used += 1
        places[d + 1] = used
    return values[:used].copy(), places


@kernel
def jaccard(values: Any, s1: Any, e1: Any, s2: Any, e2: Any) -> Any:
    """Exact Jaccard similarity of two sorted sets values[s1:e1] and values[s2:e2]; two empty sets give 0."""
    i, j, common = s1, s2, 0
    while i < e1 and j < e2:
        x, y = values[i], values[j]
        common += x == y
        i += x <= y
        j += y <= x
    union = (e1 - s1) + (e2 - s2) - common
    return common / union if union else 0.0
