"""Characters and white space: finds which documents need work, and rewrites them byte by byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel

# What `inspect` finds in a document.
NON_ASCII, MOJIBAKE, UNCLEAN, FORM = 1, 2, 4, 8
# Switches of `clean`.
CONTROL, LINES, COLLAPSE = 1, 2, 4


@kernel
def inspect(data: Any, offsets: Any) -> Any:
    """Bits per document [documents] (uint8): NON_ASCII, MOJIBAKE (worth a look by ftfy), UNCLEAN (`clean` might act),
    FORM (may not be in NFC).

    Mojibake of UTF-8 read as Latin-1 or Windows-1252 shows as U+00C2, U+00C3, U+00E2 and so on followed by
    another non-ASCII character, or as C1 control characters, or as U+FFFD.
    """
    documents = len(offsets) - 1
    out = np.zeros(documents, np.uint8)
    for d in range(documents):
        start, end = offsets[d], offsets[d + 1]
        bits = np.uint8(0)
        previous = np.uint8(0x0A)
        newlines = 1
        for i in range(start, end):
            byte = data[i]
            if byte >= 0x20 and byte < 0x7F:
                if byte == 0x20:
                    bits |= UNCLEAN if previous == 0x20 or previous == 0x0A else 0
                newlines = 0
            elif byte == 0x0A:
                newlines += 1
                if newlines > 1 or previous == 0x20 or previous == 0x09:
                    bits |= UNCLEAN
            elif byte < 0x80:
                bits |= UNCLEAN
                newlines = 0
            else:
                newlines = 0
                bits |= NON_ASCII
                if byte >= 0xC2:
                    bits |= _suspicious(data, i, end)
            previous = byte
        if end > start and (previous == 0x0A or previous == 0x20):
            bits |= UNCLEAN
        out[d] = bits
    return out


@kernel
def _suspicious(data: Any, i: Any, end: Any) -> Any:
    lead = data[i]
    if i + 1 >= end:
        return 0
    follow = data[i + 1]
    if lead == 0xC2:
        # C1 controls and NBSP are rewritten by `clean`; C1 may also be mojibake.
        return (MOJIBAKE | UNCLEAN) if follow < 0xA0 else UNCLEAN if follow == 0xA0 else 0
    if lead == 0xC3:
        # Letters that lead bytes of UTF-8 turn into, when a non-ASCII character follows.
        return MOJIBAKE if i + 2 < end and data[i + 2] >= 0xC2 else 0
    if lead == 0xE2:
        # En and em quad, Ohm, Kelvin, Angstrom, angle brackets and forking are the only ones NFC changes.
        if follow == 0x80:
            return UNCLEAN | (FORM if i + 2 < end and data[i + 2] <= 0x81 else 0)
        return FORM if follow == 0x84 or follow == 0x8C or follow == 0xAB else 0
    if lead == 0xEF:
        return (MOJIBAKE | UNCLEAN | FORM) if follow >= 0xBB else FORM
    if lead == 0xE3:
        return (UNCLEAN | FORM) if follow == 0x80 else FORM
    # Below U+0300 and among the Han ideographs of U+4000-9FFF everything is in NFC.
    return FORM if lead >= 0xCC and not 0xE4 <= lead <= 0xE9 else 0


@kernel
def _classify(data: Any, i: Any, end: Any, control: Any) -> Any:
    """(bytes, kind) of the character at i: 0 = copy, 1 = blank, 2 = line end, 3 = remove."""
    byte = data[i]
    if byte < 0x80:
        if byte == 0x20:
            return 1, 1
        if byte == 0x0A:
            return 1, 2
        if byte == 0x0D:
            return (2 if i + 1 < end and data[i + 1] == 0x0A else 1), 2
        if byte == 0x09:
            return 1, 4
        if byte == 0x0B or byte == 0x0C:
            return 1, 2
        return 1, (3 if control and (byte < 0x20 or byte == 0x7F) else 0)
    if byte == 0xC2 and i + 1 < end:
        if data[i + 1] == 0x85:
            return 2, 2
        if data[i + 1] == 0xA0:
            return 2, 1
        return 2, (3 if control and data[i + 1] < 0xA0 else 0)
    if byte == 0xE2 and i + 2 < end and data[i + 1] == 0x80:
        last = data[i + 2]
        if last == 0xA8 or last == 0xA9:
            return 3, 2
        if last <= 0x8A or last == 0xAF:
            return 3, 1
        if last == 0x8B:
            return 3, (3 if control else 0)
        return 3, 0
    if byte == 0xE3 and i + 2 < end and data[i + 1] == 0x80 and data[i + 2] == 0x80:
        return 3, 1
    if byte == 0xEF and i + 2 < end and data[i + 1] == 0xBB and data[i + 2] == 0xBF:
        return 3, (3 if control else 0)
    return 1, 0


@kernel
def _one(data: Any, start: Any, end: Any, out: Any, at: Any, switches: Any, most: Any) -> Any:
    """Rewrites one document to out[at:]; returns the end. `most` newlines may follow each other, -1 = any."""
    lines, collapse = switches & (LINES | COLLAPSE), switches & COLLAPSE
    begin = at
    solid = at  # end of the last character that is not white space
    newlines = 0
    i = start
    while i < end:
        byte = data[i]
        if 0x21 <= byte < 0x7F:
            out[at] = byte
            at += 1
            i += 1
            solid, newlines = at, 0
            continue
        size, kind = _classify(data, i, end, switches & CONTROL)
        if not lines and kind != 3:
            for k in range(i, i + size):
                out[at] = data[k]
                at += 1
        elif kind == 2:
            at = solid + newlines
            if solid > begin and (most < 0 or newlines < most):
                out[at] = 0x0A
                newlines += 1
                at += 1
        elif kind == 1 or kind == 4:
            if not collapse:
                out[at] = 0x09 if kind == 4 else 0x20
                at += 1
            elif at > begin and out[at - 1] != 0x20 and out[at - 1] != 0x0A:
                out[at] = 0x20
                at += 1
        elif kind == 0:
            for k in range(i, i + size):
                out[at] = data[k]
                at += 1
            solid, newlines = at, 0
        i += size
    return solid if lines else at


@kernel
def clean(data: Any, offsets: Any, rows: Any, switches: Any, most: Any) -> Any:
    """Texts of the documents `rows`, rewritten: (data, offsets). Never longer than before."""
    total = 0
    for r in rows:
        total += offsets[r + 1] - offsets[r]
    out = np.empty(total + 1, np.uint8)
    places = np.zeros(len(rows) + 1, np.int64)
    at = 0
    for n in range(len(rows)):
        at = _one(data, offsets[rows[n]], offsets[rows[n] + 1], out, at, switches, most)
        places[n + 1] = at
    return out[:at].copy(), places
