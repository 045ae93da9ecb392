"""Paragraphs and lines of documents as spans of bytes, and documents with spans cut out."""

from __future__ import annotations

from typing import Any

import numpy as np

from modelyard.corpus.kernels import kernel


@kernel
def _blank(byte: Any) -> Any:
    return byte == 0x20 or byte == 0x09 or byte == 0x0D


@kernel
def spans(data: Any, offsets: Any, lines: Any, least: Any) -> Any:
    """Spans of the paragraphs (or lines) of at least `least` bytes, without blanks at their ends.

    A line ends at a newline; a paragraph is a run of lines that are not blank.

    Returns:
        (document, start, end): int64 [spans], in order; start and end count from the document's first byte.
    """
    room = 1024
    found = np.empty((room, 3), np.int64)
    used = 0
    for d in range(len(offsets) - 1):
        base, end = offsets[d], offsets[d + 1]
        first, last = base - 1, base - 1  # first byte and one past the last byte that is not blank
        fresh = True  # nothing but blanks so far on this line
        for i in range(base, end + 1):
            closing = i == end
            if not closing and data[i] != 0x0A:
                if not _blank(data[i]):
                    first = i if first < base else first
                    last = i + 1
                    fresh = False
                continue
            if first >= base and (lines or fresh or closing):
                if last - first >= least:
                    if used == room:
                        bigger = np.empty((2 * room, 3), np.int64)
                        bigger[:room] = found
                        found, room = bigger, 2 * room
                    found[used, 0], found[used, 1], found[used, 2] = d, first - base, last - base
                    used += 1
                first = base - 1
            fresh = True
    return found[:used, 0].copy(), found[:used, 1].copy(), found[:used, 2].copy()


@kernel
def cut(data: Any, offsets: Any, documents: Any, starts: Any, ends: Any) -> Any:
    """The documents without the given spans, as (data, offsets from 0).

    With a span goes the white space behind it up to the last newline there, so that the next paragraph follows
    where the removed one began; a document whose end was cut off loses the white space before the cut.

    Args:
        documents, starts, ends: int64 [spans], sorted by document and start, not overlapping.
    """
    n = len(offsets) - 1
    out = np.empty(offsets[n] - offsets[0], np.uint8)
    places = np.zeros(n + 1, np.int64)
    used, at = 0, 0
    for d in range(n):
        i, end = offsets[d], offsets[d + 1]
        begin = used
        tail = False
        while at < len(documents) and documents[at] == d:
            start = offsets[d] + starts[at]
            while i < start:
                out[used] = data[i]
                used, i = used + 1, i + 1
            i = offsets[d] + ends[at]
            j, after = i, i
            while j < end and (_blank(data[j]) or data[j] == 0x0A):
                j += 1
                if data[j - 1] == 0x0A:
                    after = j
            tail = j == end
            i = end if tail else after
            at += 1
        while i < end:
            out[used] = data[i]
            used, i = used + 1, i + 1
        while tail and used > begin and (_blank(out[used - 1]) or out[used - 1] == 0x0A):
            used -= 1
        places[d + 1] = used
    return out[:used].copy(), places
