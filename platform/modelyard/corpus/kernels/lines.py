"""C4's judgement of single lines, and the rewriting of texts without the lines it does not keep."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.text import BREAK, SPACE, class_of, codepoint, width

KEEP, LONG_WORD, NO_TERMINAL, FEW_WORDS, LOREM, JAVASCRIPT, CURLY, POLICY = range(8)
# Positions in the int64 array of line rules.
R_SHORT, R_TERMINAL, R_MIN_WORDS, R_JAVASCRIPT, R_POLICY, R_MAX_WORD, R_LOREM, R_CURLY = range(8)

_LOREM = np.frombuffer(b"lorem ipsum", np.uint8)
_JAVASCRIPT = np.frombuffer(b"javascript", np.uint8)
_TERMS = np.frombuffer(b"terms of use", np.uint8)
_PRIVACY = np.frombuffer(b"privacy policy", np.uint8)
_COOKIE = np.frombuffer(b"cookie policy", np.uint8)
_USES = np.frombuffer(b"uses cookies", np.uint8)
_USE_OF = np.frombuffer(b"use of cookies", np.uint8)
_USE = np.frombuffer(b"use cookies", np.uint8)


@kernel
def _at(data: Any, i: Any, end: Any, phrase: Any) -> Any:
    """Whether data[i:end] begins with the lower-case ASCII `phrase`, in any case."""
    if i + len(phrase) > end:
        return False
    for k in range(len(phrase)):
        byte = data[i + k]
        if 65 <= byte <= 90:
            byte += 32
        if byte != phrase[k]:
            return False
    return True


@kernel
def phrases(data: Any, start: Any, end: Any) -> Any:
    """Bits 1 << LOREM, JAVASCRIPT, CURLY, POLICY of what occurs in data[start:end]."""
    found = 0
    for i in range(start, end):
        byte = data[i] | 0x20
        if byte == 0x7B:
            if data[i] == 0x7B:
                found |= 1 << CURLY
        elif byte == 0x6C:
            if _at(data, i, end, _LOREM):
                found |= 1 << LOREM
        elif byte == 0x6A:
            if _at(data, i, end, _JAVASCRIPT):
                found |= 1 << JAVASCRIPT
        elif byte == 0x74:
            if _at(data, i, end, _TERMS):
                found |= 1 << POLICY
        elif byte == 0x70:
            if _at(data, i, end, _PRIVACY):
                found |= 1 << POLICY
        elif byte == 0x63:
            if _at(data, i, end, _COOKIE):
                found |= 1 << POLICY
        elif byte == 0x75 and (_at(data, i, end, _USES) or _at(data, i, end, _USE_OF) or _at(data, i, end, _USE)):
            found |= 1 << POLICY
    return found


@kernel
def ends_sentence(data: Any, start: Any, end: Any) -> Any:
    """Whether a stripped line ends in . ? ! or a quotation mark, and not in an ellipsis."""
    if end == start:
        return False
    last = data[end - 1]
    if last == 0x2E:
        return not (end - start >= 3 and data[end - 2] == 0x2E and data[end - 3] == 0x2E)
    return last == 0x3F or last == 0x21 or last == 0x22 or last == 0x27


@kernel
def judge(data: Any, start: Any, end: Any, words: Any, longest: Any, rules: Any) -> Any:
    """The first rule a stripped line breaks, in the order of the authors' code, or KEEP."""
    if rules[R_MAX_WORD] >= 0 and longest > rules[R_MAX_WORD]:
        return LONG_WORD
    if rules[R_TERMINAL] and not ends_sentence(data, start, end):
        return NO_TERMINAL
    if rules[R_MIN_WORDS] >= 0 and words < rules[R_MIN_WORDS]:
        return FEW_WORDS
    found = phrases(data, start, end)
    if rules[R_LOREM] and found & (1 << LOREM):
        return LOREM
    if rules[R_JAVASCRIPT] and found & (1 << JAVASCRIPT):
        return JAVASCRIPT
    if rules[R_CURLY] and found & (1 << CURLY):
        return CURLY
    if rules[R_POLICY] and found & (1 << POLICY):
        return POLICY
    return KEEP


@kernel
def sentences(data: Any, start: Any, end: Any) -> Any:
    """Sentences in a stripped line: ends are . ? ! (with closing quotes or brackets) before blank and capital."""
    count, i = 0, start
    closed = True
    while i < end:
        byte = data[i]
        if byte > 0x20:
            closed = False
        if byte == 0x2E or byte == 0x3F or byte == 0x21:
            j = i + 1
            while j < end and (data[j] in (0x2E, 0x3F, 0x21, 0x22, 0x27, 0x29, 0x5D)):
                j += 1
            if j < end and data[j] == 0x20:
                k = j
                while k < end and (data[k] == 0x20 or data[k] == 0x22 or data[k] == 0x27 or data[k] == 0x28):
                    k += 1
                if k < end and (65 <= data[k] <= 90 or 48 <= data[k] <= 57 or data[k] >= 0x80):
                    count += 1
                    closed = True
            i = j
            continue
        i += 1
    return count if closed else count + 1


@kernel
def _strip(data: Any, start: Any, end: Any, table: Any) -> Any:
    """(start, end, words, characters of the longest word) of a line without outer white space."""
    first, last, words, longest, run = end, start, 0, 0, 0
    i = start
    while i < end:
        size = width(data[i])
        if class_of(codepoint(data, i, size), table) & SPACE:
            run = 0
        else:
            if run == 0:
                words += 1
            run += 1
            longest = max(longest, run)
            first = min(first, i)
            last = i + size
        i += size
    return min(first, last), last, words, longest


@kernel
def kept_lines(data: Any, offsets: Any, rows: Any, table: Any, rules: Any) -> Any:
    """Texts of the documents `rows` with only the lines `judge` keeps, stripped: (data, offsets)."""
    total = 0
    for r in rows:
        total += offsets[r + 1] - offsets[r]
    out = np.empty(total + 1, np.uint8)
    places = np.zeros(len(rows) + 1, np.int64)
    used = 0
    for n in range(len(rows)):
        i, stop = offsets[rows[n]], offsets[rows[n] + 1]
        begin = used
        while i < stop:
            j = i
            size = 1
            while j < stop:
                size = width(data[j])
                if class_of(codepoint(data, j, size), table) & BREAK:
                    break
                j += size
            start, end, words, longest = _strip(data, i, j, table)
            if judge(data, start, end, words, longest, rules) == KEEP:
                if used > begin:
                    out[used] = 0x0A
                    used += 1
                out[used : used + end - start] = data[start:end]
                used += end - start
            i = j + size
        places[n + 1] = used
    return out[:used].copy(), places
