"""Forms of what places or identifies a person: identity numbers, dates, coordinates, street addresses.

All begin at a digit. Forms are loose; telling words nearby (`context`) keep candidates rare, and
`corpus.identities` and `corpus.places` decide.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.context import (
    AXIS,
    BIRTH,
    CALL,
    GEO,
    IDENTITY,
    LEAD,
    LINK,
    SUFFIX,
    adjacent,
    after,
    before,
    letter,
    word_bits,
)  # fmt: skip
from modelyard.corpus.kernels.forms import ALPHA, DIGIT, TOKEN, UPPER, ends_in_one, has, run_end

_TAILS = (
    "straße", "strasse", "str", "weg", "platz", "allee", "gasse", "damm", "ufer", "straat", "laan", "gracht", "plein",
    "vej", "gade", "gatan", "vägen", "vegen", "gata", "katu", "utca",
)  # fmt: skip
_TAIL_BYTES = np.frombuffer("".join(_TAILS).encode(), np.uint8)
_TAIL_ENDS = np.cumsum([0] + [len(t.encode()) for t in _TAILS]).astype(np.int64)
_TAIL_LAST = np.zeros(256, np.bool_)
_TAIL_LAST[[byte for t in _TAILS for byte in (t.encode()[-1], t.upper().encode()[-1])]] = True

_IN_DEGREES = tuple(b" ',.\"-")
_BETWEEN = tuple(b" ,;NSns" + "°".encode())
_BEHIND = tuple(b" EWew" + "°".encode())


@kernel
def identity(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span that may begin with an identity number whose first digit is at i; (0, 0) = none.

    Upper-case letters and digits with single separators, and a telling word before, or a length that
    numbers with a checksum of their own have.
    """
    left = i
    while left > start and i - left < 7 and forms[data[left - 1]] & UPPER:
        left -= 1
    if left == i and i - 3 >= start and data[i - 1] == 0x20 and has(data, i + 2, start, end, forms, TOKEN) == 0:
        # British national insurance numbers are written AB 12 34 56 C.
        left -= 3 if forms[data[i - 2]] & UPPER and forms[data[i - 3]] & UPPER else 0
    if has(data, left - 1, start, end, forms, TOKEN):
        return 0, 0
    k, last, digits, plain, marks = i, i, 0, 0, 0
    letters = i - left if left == i or data[i - 1] != 0x20 else 2
    while k < end and k - left < 30:
        byte = data[k]
        if forms[byte] & DIGIT:
            digits += 1
            last = k + 1
        elif forms[byte] & UPPER:
            letters += 1
            last = k + 1
        elif forms[byte] & ALPHA or byte >= 0x80:
            break
        elif k == last and byte in (0x20, 0x2D, 0x2E, 0x2F, 0x2B):
            marks += byte != 0x20
            if byte == 0x20 and plain == 0:
                plain = digits + letters
        else:
            break
        k += 1
    total = digits + letters
    plain = plain if plain else total
    if digits < 4 or total < 7 or total > 24:
        return 0, 0
    strong = (letters > 0 and plain in (11, 16, 18)) or (marks > 0 and plain in (9, 11, 13)) or plain in (13, 15, 18)
    if strong or total == 15 or before(data, left, start, forms) & IDENTITY:
        return left, last
    return 0, 0


@kernel
def date(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a date around the number at i with a word of birth before it; (0, 0) = none."""
    last = run_end(data, i, end, forms, DIGIT)
    size = last - i
    if size > 4 or last + 3 > end:
        return 0, 0
    mark = data[last]
    if (mark == 0x2D or mark == 0x2F or mark == 0x2E) and has(data, last + 1, start, end, forms, DIGIT):
        middle = run_end(data, last + 1, end, forms, DIGIT)
        right = run_end(data, middle + 1, end, forms, DIGIT)
        if middle - last > 3 or middle >= end or data[middle] != mark or not 1 <= right - middle - 1 <= 4:
            return 0, 0
        left = i
    elif size <= 2 and (mark == 0x20 or mark == 0x2C or mark == 0x2E or letter(mark, forms)):
        # 12 March 1985, 12. März 1985, 12th of March, 1985; March 12, 1985
        left, right, k = i, 0, last
        while k < end and k - last < 24 and right == 0:
            if forms[data[k]] & DIGIT:
                right = run_end(data, k, end, forms, DIGIT)
            elif not (letter(data[k], forms) or data[k] in (0x20, 0x2C, 0x2E)):
                return 0, 0
            k += 1
        if right == 0 or right - k + 1 != 4:
            return 0, 0
        if left - 1 > start and data[left - 1] in (0x20, 0x2E) and k - last <= 6:
            left -= 2 if data[left - 1] == 0x20 and data[left - 2] == 0x2E else 1
            while left > start and i - left < 14 and letter(data[left - 1], forms):
                left -= 1
    else:
        return 0, 0
    return (left, right) if before(data, i, start, forms) & BIRTH else (0, 0)


@kernel
def _decimal(data: Any, i: Any, end: Any, forms: Any) -> Any:
    """End of a number of 1 to 3 digits, a point and at least 3 decimals at i; 0 = none."""
    point = run_end(data, i, end, forms, DIGIT)
    if point == i or point - i > 3 or point >= end or data[point] != 0x2E:
        return 0
    last = run_end(data, point + 1, end, forms, DIGIT)
    return last if last - point >= 4 else 0


@kernel
def coordinates(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a position, or of one axis behind its name, whose first digit is at i; (0, 0) = none."""
    left = i - 1 if i > start and (data[i - 1] == 0x2D or data[i - 1] == 0x2B) else i
    degrees = run_end(data, i, min(end, i + 4), forms, DIGIT)
    if degrees + 1 < end and data[degrees] == 0xC2 and data[degrees + 1] == 0xB0:
        k = degrees
        while (
            k < end and k - i < 60 and (forms[data[k]] & (DIGIT | UPPER) or data[k] >= 0x80 or data[k] in _IN_DEGREES)
        ):
            k += 1
        return left, k
    first = _decimal(data, i, end, forms)
    if first == 0:
        return 0, 0
    k = first
    while k < end and k - first < 6 and data[k] in _BETWEEN:
        k += 1
    if k < end and (data[k] == 0x2D or data[k] == 0x2B):
        k += 1
    last = _decimal(data, k, end, forms) if k > first else 0
    if last:
        url = left > start and (data[left - 1] == 0x40 or data[left - 1] == 0x3D)
        marked = has(data, first, start, end, forms, UPPER) or (first + 1 < end and data[first] == 0xC2)
        if url or marked or before(data, left, start, forms) & (GEO | AXIS):
            tail = last
            while tail < end and tail - last < 4 and data[tail] in _BEHIND:
                tail += 1
            return left, tail if has(data, tail - 1, start, end, forms, UPPER) else last
    return (left, first) if adjacent(data, left, start, forms) & AXIS else (0, 0)


@kernel
def _street_tail(data: Any, start: Any, end: Any, forms: Any) -> Any:
    """Whether the word data[start:end] ends like the name of a street (Hauptstraße, Nybyvägen)."""
    # Some letters must come before: "Weg" and "Platz" alone are words.
    return _TAIL_LAST[data[end - 1]] and ends_in_one(data, end, start + 2, _TAIL_BYTES, _TAIL_ENDS, forms)


@kernel
def _name(data: Any, k: Any, end: Any, forms: Any) -> Any:
    """End of a word of a street's name at k (letters, ' . -, or an ordinal); k = none."""
    last = k
    while last < end and (letter(data[last], forms) or forms[data[last]] & DIGIT or data[last] in (0x27, 0x2D)):
        last += 1
    return last


@kernel
def _capital(byte: Any, forms: Any) -> Any:
    return forms[byte] & (UPPER | DIGIT) or byte >= 0x80


@kernel
def address(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Span of a house number at i with the street behind it (12 Elm Street, 5 rue de la Paix) or before it
    (Hauptstraße 5, Via Roma 10); (0, 0) = none."""
    last = run_end(data, i, end, forms, DIGIT)
    if last - i > 5 or (i > start and data[i - 1] in (0x2E, 0x2D, 0x2F, 0x24, 0x3A, 0x5F, 0x3D, 0x5C)):
        return 0, 0
    k = last + (1 if has(data, last, start, end, forms, ALPHA) else 0)
    if not has(data, k, start, end, forms, TOKEN) and last - i <= 4:
        left = _street_before(data, i, start, end, forms)
        if left < i:
            return left, k
    if k < end and data[k] == 0x2C:
        k += 1
    words, named, led, stop = 0, False, False, 0
    while words < 7 and k + 1 < end and data[k] == 0x20:
        word = k + 1
        k = _name(data, word, end, forms)
        bits = word_bits(data, word, k, forms)
        if k == word or (words == 0 and not named and bits & LINK):
            break
        if bits & SUFFIX and named:
            stop = k + (1 if k < end and data[k] == 0x2E else 0)
            if not led:
                break
        if bits & LEAD and words == 0:
            led = True
        elif bits & LINK:
            pass
        elif _capital(data[word], forms):
            named = True
            stop = k if led else stop
        else:
            break
        words += 1
        if k < end and data[k] == 0x2E:
            k += 1
    return (i, stop) if stop else (0, 0)


@kernel
def _street_before(data: Any, i: Any, start: Any, end: Any, forms: Any) -> Any:
    """Start of the street's name that ends just before the house number at i; i = none."""
    k, words, named = i, 0, False
    while words < 6 and k - 1 > start and (data[k - 1] == 0x20 or (data[k - 1] == 0x2E and words)):
        stop = k - 1
        if stop > start and data[stop - 1] == 0x2E:
            stop -= 1
        word = stop
        while word > start and (letter(data[word - 1], forms) or data[word - 1] == 0x27 or data[word - 1] == 0x2D):
            word -= 1
        if word == stop or has(data, word - 1, start, end, forms, DIGIT):
            return i
        capital = _capital(data[word], forms)
        if words == 0 and capital and _street_tail(data, word, stop, forms):
            return word
        if named or not capital:
            bits = word_bits(data, word, stop, forms)
            if bits & LEAD and named:
                return word
            if not capital and not bits & LINK:
                return i
        named = named or capital
        words += 1
        k = word
    return i


@kernel
def called(data: Any, left: Any, last: Any, start: Any, end: Any, forms: Any) -> Any:
    """Whether words around a number say that it is for calling."""
    return before(data, left, start, forms) & CALL or after(data, last, end, forms) & CALL
