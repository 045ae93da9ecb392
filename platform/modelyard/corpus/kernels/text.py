"""Characters and hashing, shared by the kernels: a class table for code points, UTF-8 steps, 64-bit mixing."""

from __future__ import annotations

import functools
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel

SPACE, ALPHA, SYMBOL, BREAK, TERMINAL = 1, 2, 4, 8, 16
CLASSES = 0x20000  # BMP and SMP; beyond lie almost only CJK ideographs

MUL = np.uint64(0x9E3779B97F4A7C15)
SEED = np.uint64(0xCBF29CE484222325)
PRIME = np.uint64(0x00000100000001B3)

# Code points with the Unicode property Sentence_Terminal (UAX 44) that occur in text on the web.
_TERMINALS = (
    ".?!\u0589\u061d\u061e\u061f\u06d4\u0700\u0701\u0702\u07f9\u0964\u0965\u104a\u104b\u1362\u1367\u1368\u166e"
    "\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u203c\u203d\u2047\u2048\u2049\u2e2e\u3002\ua4ff\ufe52"
    "\ufe56\ufe57\uff01\uff0e\uff1f\uff61"
)


@functools.cache
def classes() -> npt.NDArray[np.uint8]:
    """Class bits of each code point below 0x20000, from this Python's Unicode tables (about 50 ms)."""
    table = np.zeros(CLASSES, np.uint8)
    for point in range(CLASSES):
        char = chr(point)
        bits = SPACE if char.isspace() else 0
        if char.isalpha():
            bits |= ALPHA
        elif unicodedata.category(char)[0] in "PSC" and not bits:
            bits |= SYMBOL
        table[point] = bits
    for char in "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029":
        table[ord(char)] |= BREAK
    for char in _TERMINALS:
        table[ord(char)] |= TERMINAL
    return table


@kernel
def width(lead: Any) -> Any:
    """Bytes of the UTF-8 sequence that begins with byte `lead`."""
    if lead < 0x80:
        return 1
    if lead < 0xE0:
        return 2
    return 3 if lead < 0xF0 else 4


@kernel
def codepoint(data: Any, i: Any, size: Any) -> Any:
    """The code point of the `size` bytes at `i` of valid UTF-8."""
    b0 = np.int64(data[i])
    if size == 1:
        return b0
    b1 = np.int64(data[i + 1]) & 0x3F
    if size == 2:
        return ((b0 & 0x1F) << 6) | b1
    b2 = np.int64(data[i + 2]) & 0x3F
    if size == 3:
        return ((b0 & 0x0F) << 12) | (b1 << 6) | b2
    return ((b0 & 0x07) << 18) | (b1 << 12) | (b2 << 6) | (np.int64(data[i + 3]) & 0x3F)


@kernel
def class_of(point: Any, table: Any) -> Any:
    """Class bits of a code point: beyond the table everything counts as a letter."""
    if point < CLASSES:
        return np.int64(table[point])
    return np.int64(ALPHA)


@kernel
def mix(h: Any) -> Any:
    """Spreads 64 bits so that every input bit reaches every output bit (the finalizer of MurmurHash3)."""
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xFF51AFD7ED558CCD)
    h ^= h >> np.uint64(33)
    h *= np.uint64(0xC4CEB9FE1A85EC53)
    return h ^ (h >> np.uint64(33))


@kernel
def hash_bytes(data: Any, start: Any, end: Any) -> Any:
    """64-bit hash of a byte range (FNV-1a with a final mix)."""
    h = SEED
    for i in range(start, end):
        h = (h ^ np.uint64(data[i])) * PRIME
    return mix(h)
