"""Which of many phrases stand in a text: hashed word n-grams, every hit verified against the words themselves.

Words are those of `minhash` (ASCII letters in lower case, punctuation separates). A phrase set holds n-grams
of a few lengths; prefix hashes give the hash of any window of words in one multiplication, so a document
costs one pass and a table look-up for each word and length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.minhash import _M, FOLD, _skip
from modelyard.corpus.kernels.text import PRIME, SEED, mix

Ints = npt.NDArray[np.int64]


@kernel
def words(data: Any, start: Any, end: Any, fold: Any, hashes: Any, starts: Any, ends: Any) -> Any:
    """Writes hash, start and end of every word of data[start:end]; returns how many. Arrays hold end - start."""
    n, h, begin, i = 0, SEED, -1, start
    while i < end:
        byte = fold[data[i]]
        step = 1
        if byte >= 0x80:
            step = _skip(data, i, end)
        if (byte and byte < 0x80) or step == 0:
            begin = i if begin < 0 else begin
            h = (h ^ np.uint64(byte)) * PRIME
            i += 1
            continue
        if begin >= 0:
            hashes[n], starts[n], ends[n] = h, begin, i
            n, h, begin = n + 1, SEED, -1
        if step < 0:
            step = -step
            for j in range(i, i + step):
                h = (h ^ np.uint64(data[j])) * PRIME
            hashes[n], starts[n], ends[n] = h, i, i + step
            n, h = n + 1, SEED
        i += step
    if begin >= 0:
        hashes[n], starts[n], ends[n] = h, begin, end
        n += 1
    return n


@kernel
def _prefix(hashes: Any, n: Any, out: Any) -> Any:
    out[0] = 0
    for i in range(n):
        out[i + 1] = out[i] * _M + hashes[i]
    return n


@kernel
def _power(n: Any) -> Any:
    p = np.uint64(1)
    for _ in range(n):
        p *= _M
    return p


@kernel
def _longest(offsets: Any) -> Any:
    size = 1
    for d in range(len(offsets) - 1):
        size = max(size, offsets[d + 1] - offsets[d])
    return size


@kernel
def grams(data: Any, offsets: Any, fold: Any, n: Any, least: Any, hashes: Any, where: Any, bounds: Any) -> Any:
    """Writes the n-grams of all items, and all of its words for an item of `least` to n - 1; returns both counts.

    Args:
        hashes, where: uint64 [g], int64 [g, 3] = first word, item, length; g = len(data) is enough.
        bounds: int64 [w, 2]: start and end of every word of all items in `data`.
    """
    size = _longest(offsets)
    h, s, e = np.empty(size, np.uint64), np.empty(size, np.int64), np.empty(size, np.int64)
    p = np.empty(size + 1, np.uint64)
    used, total = 0, 0
    for d in range(len(offsets) - 1):
        count = words(data, offsets[d], offsets[d + 1], fold, h, s, e)
        _prefix(h, count, p)
        length = n if count >= n else count
        if count >= min(least, n) and count > 0:
            power = _power(length)
            for i in range(count - length + 1):
                hashes[used] = mix(p[i + length] - p[i] * power)
                where[used, 0], where[used, 1], where[used, 2] = total + i, d, length
                used += 1
        for i in range(count):
            bounds[total + i, 0], bounds[total + i, 1] = s[i], e[i]
        total += count
    return used, total


@kernel
def _same(data: Any, s: Any, e: Any, i: Any, other: Any, bounds: Any, first: Any, length: Any, fold: Any) -> Any:
    """Whether `length` words of a document from word i on are those of the phrase at word `first`."""
    for w in range(length):
        a, b = s[i + w], bounds[first + w, 0]
        if e[i + w] - a != bounds[first + w, 1] - b:
            return False
        for k in range(e[i + w] - a):
            if fold[data[a + k]] != fold[other[b + k]]:
                return False
    return True


@kernel
def search(
    data: Any, offsets: Any, fold: Any, lengths: Any, keys: Any, values: Any, runs: Any, where: Any, other: Any,
    bounds: Any, out: Any, totals: Any,
) -> Any:  # fmt: skip
    """Writes verified hits int64 [room, 4] = document, phrase, start, end in `data`; returns how many there are.

    `totals` gets the words of each document. Hits beyond the room are only counted.
    """
    size = _longest(offsets)
    h, s, e = np.empty(size, np.uint64), np.empty(size, np.int64), np.empty(size, np.int64)
    p = np.empty(size + 1, np.uint64)
    powers = np.empty(len(lengths), np.uint64)
    for j in range(len(lengths)):
        powers[j] = _power(lengths[j])
    mask = np.uint64(len(keys) - 1)
    used = 0
    for d in range(len(offsets) - 1):
        count = words(data, offsets[d], offsets[d + 1], fold, h, s, e)
        totals[d] = count
        _prefix(h, count, p)
        for j in range(len(lengths)):
            length, power = lengths[j], powers[j]
            for i in range(count - length + 1):
                value = mix(p[i + length] - p[i] * power)
                place = np.int64(value & mask)
                while values[place] >= 0 and keys[place] != value:
                    place = np.int64((np.uint64(place) + np.uint64(1)) & mask)
                run = values[place]
                if run < 0:
                    continue
                for g in range(runs[run], runs[run + 1]):
                    if where[g, 2] != length or not _same(data, s, e, i, other, bounds, where[g, 0], length, fold):
                        continue
                    if used < len(out):
                        out[used, 0], out[used, 1], out[used, 2], out[used, 3] = d, g, s[i], e[i + length - 1]
                    used += 1
    return used


@kernel
def _fill(unique: Any, keys: Any, values: Any) -> Any:
    mask = np.uint64(len(keys) - 1)
    for u in range(len(unique)):
        place = np.int64(unique[u] & mask)
        while values[place] >= 0:
            place = np.int64((np.uint64(place) + np.uint64(1)) & mask)
        keys[place] = unique[u]
        values[place] = u
    return len(unique)


@dataclass(frozen=True)
class Phrases:
    """A searchable set. Memory: 56 bytes an n-gram and 16 a word of the items, besides their text.

    Attributes:
        items: item number of each phrase, int64 [phrases].
        skipped: how many items were too short.
    """

    data: npt.NDArray[np.uint8]
    bounds: Ints
    where: Ints
    keys: npt.NDArray[np.uint64]
    values: npt.NDArray[np.int32]
    runs: Ints
    lengths: Ints
    skipped: int

    @classmethod
    def build(cls, data: npt.NDArray[np.uint8], offsets: Ints, n: int, least: int) -> Phrases:
        """From the items' UTF-8: their word n-grams; an item of `least` to n - 1 words is one phrase."""
        room = int(offsets[-1] - offsets[0]) + 1
        hashes, where = np.empty(room, np.uint64), np.empty((room, 3), np.int64)
        bounds = np.empty((room, 2), np.int64)
        used, total = grams(data, offsets, FOLD, n, least, hashes, where, bounds)
        order = np.argsort(hashes[:used], kind="stable")
        unique, first = np.unique(hashes[:used][order], return_index=True)
        where = where[:used][order]
        size = 1 << max(int(len(unique) * 4).bit_length(), 4)
        keys, values = np.zeros(size, np.uint64), np.full(size, -1, np.int32)
        _fill(unique, keys, values)
        skipped = len(offsets) - 1 - len(np.unique(where[:, 1]))
        return cls(
            data, bounds[:total].copy(), where, keys, values, np.append(first, used).astype(np.int64),
            np.unique(where[:, 2]), skipped,
        )  # fmt: skip

    def find(self, data: npt.NDArray[np.uint8], offsets: Ints) -> tuple[Ints, Ints]:
        """(hits int64 [h, 4] = document, item, start, end in `data`; words of each document)."""
        out, totals = np.empty((1024, 4), np.int64), np.zeros(len(offsets) - 1, np.int64)
        arguments = (FOLD, self.lengths, self.keys, self.values, self.runs, self.where, self.data, self.bounds)
        while (found := search(data, offsets, *arguments, out, totals)) > len(out):
            out = np.empty((found, 4), np.int64)
        hits = out[:found].copy()
        hits[:, 1] = self.where[hits[:, 1], 1]
        return hits, totals
