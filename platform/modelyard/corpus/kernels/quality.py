"""All statistics of the Gopher, C4 and FineWeb rules in one pass over the bytes of each document.

The pass cuts a document into words (maximal runs of non-blank code points) and lines, and notes their
hashes and lengths in code points; n-gram and line statistics then run over those small arrays. Memory:
about 40 bytes a word of the longest document.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from modelyard.corpus.kernels import kernel
from modelyard.corpus.kernels.lines import CURLY, KEEP, LOREM, R_SHORT, judge, sentences
from modelyard.corpus.kernels.text import (
    ALPHA,
    BREAK,
    MUL,
    PRIME,
    SEED,
    SPACE,
    SYMBOL,
    TERMINAL,
    class_of,
    codepoint,
    mix,
    width,
)

STATISTICS = (
    "chars", "words", "real_words", "real_word_chars", "alphabetic_words", "stop_words", "hashes", "ellipses",
    "newlines", "lines", "bullet_lines", "ellipsis_lines", "filled_lines", "punctuated_lines", "short_lines",
    "filled_duplicate_chars", "repetition_lines", "duplicate_lines", "duplicate_line_chars", "paragraphs",
    "duplicate_paragraphs", "duplicate_paragraph_chars", "top_2gram", "top_3gram", "top_4gram", "duplicate_5gram",
    "duplicate_6gram", "duplicate_7gram", "duplicate_8gram", "duplicate_9gram", "duplicate_10gram", "c4_lines",
    "c4_sentences", "c4_lorem", "c4_curly",
)  # fmt: skip
(
    CHARS, WORDS, REAL, REAL_CHARS, ALPHABETIC, STOPS, HASHES, ELLIPSES, NEWLINES, LINES, BULLETS, ELLIPSIS_LINES,
    FILLED, PUNCTUATED, SHORT, FILLED_DUP, REP_LINES, DUP_LINES, DUP_LINE_CHARS, PARAGRAPHS, DUP_PARAS,
    DUP_PARA_CHARS, TOP_2, TOP_3, TOP_4, DUP_5, DUP_6, DUP_7, DUP_8, DUP_9, DUP_10, C4_LINES, C4_SENTENCES,
    C4_LOREM, C4_CURLY,
) = range(len(STATISTICS))  # fmt: skip

# Columns of the line table.
_START, _END, _FIRST, _LAST, _LENGTH, _WORDS, _LONGEST, _FLAGS = range(8)
_F_BULLET, _F_ELLIPSIS, _F_TERMINAL = 1, 2, 4


def stop_hashes() -> npt.NDArray[np.uint64]:
    """Hashes of Gopher's eight stop words, as the kernel hashes words."""
    out = []
    for word in ("the", "be", "to", "of", "and", "that", "have", "with"):
        h = int(SEED)
        for byte in word.encode():
            h = ((h ^ byte) * int(PRIME)) & 0xFFFFFFFFFFFFFFFF
        out.append(h)
    return np.array(out, np.uint64)


@kernel
def _find(key: Any, mask: Any, stamp: Any, keys: Any, stamps: Any) -> Any:
    """Slot of `key` in an open-addressing table: filled if stamps[slot] == stamp, else free."""
    slot = np.int64(mix(key) & np.uint64(mask))
    while stamps[slot] == stamp and keys[slot] != key:
        slot = (slot + 1) & mask
    return slot


@kernel
def _mask_for(n: Any) -> Any:
    size = 16
    while size < 2 * n:
        size *= 2
    return size - 1


@kernel
def _grams(words: Any, hashes: Any, lengths: Any, out: Any, stamp: Any, keys: Any, stamps: Any, value: Any,
           count: Any, gram: Any, live: Any) -> Any:  # fmt: skip
    """Fills TOP_2..DUP_10 of one document of `words` words; `lengths` are prefix sums of word lengths.

    An n-gram can only recur where its first n - 1 words recur: `live` marks those starts, and all others
    are skipped, which leaves a small part of the work for n > 2 on ordinary text.
    """
    mask = _mask_for(words)
    for i in range(words):
        gram[i], live[i] = hashes[i], True
    for n in range(2, 11):
        last = words - n + 1
        if last <= 0:
            break
        for i in range(last):
            gram[i] = gram[i] * MUL + hashes[i + n - 1]
        if n <= 4:
            stamp, any_live = _top(n, last, gram, lengths, out, mask, stamp, keys, stamps, value, count, live)
            if not any_live:
                # No gram recurs: the most frequent longer one is the first, once.
                for m in range(n + 1, 5):
                    if words >= m:
                        out[TOP_2 + m - 2] = lengths[m] - lengths[0] + m - 1
                break
        else:
            stamp += 1
            repeated = 0
            i = 0
            while i < last:
                if live[i]:
                    slot = _find(gram[i], mask, stamp, keys, stamps)
                    if stamps[slot] == stamp:
                        repeated += lengths[i + n] - lengths[i]
                        i += n
                        continue
                    stamps[slot], keys[slot] = stamp, gram[i]
                i += 1
            out[DUP_5 + n - 5] = repeated
            # When no 5-gram recurs no longer one does.
            if repeated == 0:
                break
    return stamp


@kernel
def _top(n: Any, last: Any, gram: Any, lengths: Any, out: Any, mask: Any, stamp: Any, keys: Any, stamps: Any,
         value: Any, count: Any, live: Any) -> Any:  # fmt: skip
    """Characters of the most frequent n-gram (the earliest of equals) times its count; narrows `live`."""
    stamp += 1
    for i in range(last):
        count[i] = 0
        if live[i]:
            slot = _find(gram[i], mask, stamp, keys, stamps)
            if stamps[slot] != stamp:
                stamps[slot], keys[slot], value[slot] = stamp, gram[i], i
            count[value[slot]] += 1
    best, at = 1, 0
    for i in range(last):
        if count[i] > best:
            best, at = count[i], i
    out[TOP_2 + n - 2] = best * (lengths[at + n] - lengths[at] + n - 1)
    if best == 1:
        return stamp, False
    for i in range(last):
        if live[i]:
            slot = _find(gram[i], mask, stamp, keys, stamps)
            live[i] = count[value[slot]] > 1
    return stamp, True


@kernel
def _lines(n: Any, table: Any, hashes: Any, data: Any, rules: Any, out: Any, stamp: Any, keys: Any, stamps: Any) -> Any:
    """Line and paragraph statistics of one document from its line table."""
    mask = _mask_for(n)
    stamp += 1
    for i in range(n):
        row = table[i]
        flags, length = row[_FLAGS], row[_LENGTH]
        out[BULLETS] += (flags & _F_BULLET) != 0
        out[ELLIPSIS_LINES] += (flags & _F_ELLIPSIS) != 0
        if length == 0:
            continue
        filled = row[_WORDS] > 0
        out[REP_LINES] += 1
        slot = _find(hashes[i], mask, stamp, keys, stamps)
        if stamps[slot] == stamp:
            out[DUP_LINES] += 1
            out[DUP_LINE_CHARS] += length
            out[FILLED_DUP] += length if filled else 0
        else:
            stamps[slot], keys[slot] = stamp, hashes[i]
        if filled:
            out[FILLED] += 1
            out[PUNCTUATED] += (flags & _F_TERMINAL) != 0
            out[SHORT] += length <= rules[R_SHORT]
        verdict = judge(data, row[_FIRST], row[_LAST], row[_WORDS], row[_LONGEST], rules)
        if verdict == KEEP and filled:
            out[C4_LINES] += 1
            out[C4_SENTENCES] += sentences(data, row[_FIRST], row[_LAST])
        out[C4_LOREM] += verdict == LOREM
        out[C4_CURLY] += verdict == CURLY
    return _paragraphs(n, table, hashes, out, stamp, keys, stamps, mask)


@kernel
def _paragraphs(n: Any, table: Any, hashes: Any, out: Any, stamp: Any, keys: Any, stamps: Any, mask: Any) -> Any:
    stamp += 1
    h, length, inside = SEED, 0, False
    for i in range(n + 1):
        if i < n and table[i, _LENGTH] > 0:
            h = h * MUL + hashes[i]
            length += table[i, _LENGTH] + (1 if inside else 0)
            inside = True
            continue
        if inside:
            out[PARAGRAPHS] += 1
            slot = _find(h, mask, stamp, keys, stamps)
            if stamps[slot] == stamp:
                out[DUP_PARAS] += 1
                out[DUP_PARA_CHARS] += length
            else:
                stamps[slot], keys[slot] = stamp, h
        h, length, inside = SEED, 0, False
    return stamp


@kernel
def _size(data: Any, start: Any, end: Any) -> Any:
    """(words, lines) of a document at most: ASCII blanks and non-ASCII bytes bound both."""
    blanks, breaks = 1, 1
    for i in range(start, end):
        byte = data[i]
        blanks += byte <= 0x20 or byte >= 0xC2
        breaks += byte <= 0x1E or byte == 0xC2 or byte == 0xE2
    return blanks, breaks


@kernel
def _scan(data: Any, start: Any, end: Any, table: Any, stops: Any, out: Any, hashes: Any, lengths: Any, lines: Any,
          line_hashes: Any) -> Any:  # fmt: skip
    """Cuts one document into words and lines; returns (words, lines)."""
    words, count, stop_bits = 0, 0, 0
    chars, run, bits = 0, 0, 0
    h, line_hash = SEED, SEED
    line_start, line_chars, line_words, longest = start, 0, 0, 0
    first, last, last_class, dots, ellipsis = -1, start, 0, 0, False
    lengths[0] = 0
    i = start
    while True:
        closing = i >= end
        size = 1
        point = np.int64(0x0A)
        if not closing:
            size = width(data[i])
            point = codepoint(data, i, size)
        cls = class_of(point, table)
        if cls & SPACE or closing:
            if run:
                real = (bits & (ALPHA | 64)) != 0
                out[REAL] += real
                out[REAL_CHARS] += run if real else 0
                out[ALPHABETIC] += (bits & ALPHA) != 0
                if 2 <= run <= 4:
                    for s in range(len(stops)):
                        if stops[s] == h:
                            stop_bits |= 1 << s
                hashes[words] = h
                words += 1
                lengths[words] = lengths[words - 1] + run
                longest = max(longest, run)
                line_words += 1
                h, run, bits = SEED, 0, 0
            if cls & BREAK or closing:
                if not closing or i > line_start:
                    row = lines[count]
                    row[_START], row[_END] = line_start, i
                    row[_FIRST], row[_LAST] = (first, last) if first >= 0 else (i, i)
                    row[_LENGTH], row[_WORDS], row[_LONGEST] = line_chars, line_words, longest
                    flags = 0
                    if first >= 0:
                        flags |= _F_BULLET if data[first] == 0x2D else 0
                        if data[first] == 0xE2 and data[first + 1] == 0x80 and data[first + 2] == 0xA2:
                            flags |= _F_BULLET
                        flags |= _F_ELLIPSIS if dots >= 3 or ellipsis else 0
                        flags |= _F_TERMINAL if last == i and last_class & TERMINAL else 0
                    row[_FLAGS] = flags
                    line_hashes[count] = line_hash
                    count += 1
                if closing:
                    break
                if data[i] == 0x0D and i + 1 < end and data[i + 1] == 0x0A:
                    chars += 1
                    size = 2
                out[NEWLINES] += 1
                line_start, line_chars, line_words, longest = i + size, 0, 0, 0
                first, dots, ellipsis, last_class, line_hash = -1, 0, False, 0, SEED
                chars += 1
                i += size
                continue
        else:
            if run == 0:
                dots, ellipsis = 0, False
            run += 1
            # Bit 64 marks a code point that is neither letter nor symbol, such as a digit.
            bits |= cls if cls & (ALPHA | SYMBOL) else 64
            for k in range(i, i + size):
                h = (h ^ np.uint64(data[k])) * PRIME
            first = i if first < 0 else first
            last, last_class = i + size, cls
            dots = dots + 1 if point == 0x2E else 0
            ellipsis = point == 0x2026
            out[ELLIPSES] += ellipsis or (dots > 0 and dots % 3 == 0)
            out[HASHES] += point == 0x23
        for k in range(i, i + size):
            line_hash = (line_hash ^ np.uint64(data[k])) * PRIME
        chars += 1
        line_chars += 1
        i += size
    out[CHARS], out[WORDS], out[LINES] = chars, words, count
    for s in range(len(stops)):
        out[STOPS] += (stop_bits >> s) & 1
    return words, count


@kernel
def statistics(data: Any, offsets: Any, table: Any, stops: Any, rules: Any) -> Any:
    """Counts [documents, len(STATISTICS)] (int64) that all rule sets are decided from.

    Args:
        data, offsets: valid UTF-8 of the documents.
        table: class bits of code points, as of `text.classes()`.
        stops: as of `stop_hashes()`.
        rules: int64 [8], the line rules of `kernels.lines` (R_SHORT ... R_CURLY), -1 = off.
    """
    documents = len(offsets) - 1
    out = np.zeros((documents, len(STATISTICS)), np.int64)
    words, lines = 1024, 256
    for d in range(documents):
        w, n = _size(data, offsets[d], offsets[d + 1])
        words, lines = max(words, w), max(lines, n)
    hashes = np.empty(words, np.uint64)
    gram = np.empty(words, np.uint64)
    lengths = np.empty(words + 1, np.int64)
    count = np.empty(words, np.int32)
    live = np.empty(words, np.bool_)
    rows = np.empty((lines, 8), np.int64)
    line_hashes = np.empty(lines, np.uint64)
    slots = _mask_for(max(words, lines)) + 1
    keys = np.empty(slots, np.uint64)
    value = np.empty(slots, np.int32)
    stamps = np.zeros(slots, np.int64)
    stamp = 0
    for d in range(documents):
        row = out[d]
        w, n = _scan(data, offsets[d], offsets[d + 1], table, stops, row, hashes, lengths, rows, line_hashes)
        stamp = _lines(n, rows, line_hashes, data, rules, row, stamp, keys, stamps)
        stamp = _grams(w, hashes, lengths, row, stamp, keys, stamps, value, count, gram, live)
    return out
