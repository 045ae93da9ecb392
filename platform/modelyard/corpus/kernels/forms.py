"""Byte classes that entity forms are written in, and the helpers that read them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel

DIGIT, ALPHA, HEX, LOCAL, TOKEN, UPPER = 1, 2, 4, 8, 16, 32


def _table(bits: dict[int, bytes]) -> npt.NDArray[np.uint8]:
    table = np.zeros(256, np.uint8)
    for bit, chars in bits.items():
        table[list(chars)] |= bit
    return table


_LOWER = b"abcdefghijklmnopqrstuvwxyz"
_DIGITS = b"0123456789"
FORMS = _table(
    {
        DIGIT: _DIGITS,
        ALPHA: _LOWER + _LOWER.upper(),
        HEX: _DIGITS + b"abcdefABCDEF",
        LOCAL: _DIGITS + _LOWER + _LOWER.upper() + b"._%+-",
        TOKEN: _DIGITS + _LOWER + _LOWER.upper() + b"_-",
        UPPER: _LOWER.upper(),
    }
)


@kernel
def begins(data: Any, i: Any, end: Any, phrase: Any) -> Any:
    """Whether data[i:end] begins with the bytes of `phrase`."""
    if i + len(phrase) > end:
        return False
    same = True
    for k in range(len(phrase)):
        same = same and data[i + k] == phrase[k]
    return same


@kernel
def ends_in_one(data: Any, stop: Any, start: Any, phrases: Any, bounds: Any, forms: Any) -> Any:
    """Whether data[start:stop] ends with one of the phrases in lower case, upper and lower case ASCII alike.

    `phrases` holds the bytes of all; number p is phrases[bounds[p] : bounds[p + 1]].
    """
    for p in range(len(bounds) - 1):
        first, j = bounds[p], bounds[p + 1] - 1
        at = stop - (j + 1 - first)
        if at < start:
            continue
        while j >= first:
            byte = data[at + j - first]
            if (byte | 0x20 if forms[byte] & UPPER else byte) != phrases[j]:
                break
            j -= 1
        if j < first:
            return True
    return False


@kernel
def has(data: Any, i: Any, start: Any, end: Any, forms: Any, bits: Any) -> Any:
    """Whether the byte at i lies in the document and has one of `bits`."""
    return start <= i < end and (forms[data[i]] & bits) != 0


@kernel
def run_end(data: Any, i: Any, end: Any, forms: Any, bits: Any) -> Any:
    """End of the run of bytes with one of `bits` from i on."""
    while i < end and forms[data[i]] & bits:
        i += 1
    return i
