"""Records of WARC files (ISO 28500; also WET): framing, and every way it can be broken.

A record is good when its headers parse, its block is as long as Content-Length says, and a record or the end
of the file follows. Otherwise it is set aside and reading goes on at the next record, or the next gzip member.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from modelyard.corpus.read.inflate import Break, Inflated

_HEAD = 1 << 16  # longest header block, bytes
_VERSION = re.compile(rb"WARC/[01]\.\d+\r?\n")
_NEXT = re.compile(rb"\n\r?\nWARC/[01]\.\d+\r?\n")
_INNER = re.compile(rb"\nWARC/[01]\.\d+\r?\n")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_NEWLINES = re.compile(rb"[\r\n]+")
_LONGEST = 24  # bytes _NEXT may take


@dataclass(frozen=True)
class WarcRecord:
    """One record: `headers` by lower-case name, `block` as stored.

    `position` counts inflated bytes and is unique in a file; `offset` is the stored byte at which the record,
    or the gzip member that holds it, begins: what a CDX index names.
    """

    position: int
    offset: int
    headers: dict[str, str]
    block: bytes

    @property
    def type(self) -> str:
        """`response`, `conversion`, `request`..., in lower case."""
        return self.headers.get("warc-type", "").lower()


@dataclass(frozen=True)
class WarcDamage:
    """A stretch of a file that is no readable record. See `WarcRecord` for the places; `size` counts inflated bytes."""

    position: int
    offset: int
    reason: str
    detail: str
    size: int = 0
    excerpt: bytes = b""


class _Window:
    """The inflated bytes from `position` on, filled on demand up to damage or the end."""

    def __init__(self, handle: IO[bytes], kind: str) -> None:
        self._source, self._plain = Inflated(handle, kind), not kind
        self.data = bytearray()
        self.position = 0
        self.broken: Break | None = None
        self._ended = False
        self._starts: deque[tuple[int, int]] = deque()  # (position, stored offset) of members

    def fill(self) -> bool:
        """Appends a piece; False at damage (`broken`) or the end of the file."""
        while self.broken is None and not self._ended:
            piece = self._source.read()
            for start in self._source.begun:
                self._starts.append((self.position + len(self.data), start))
            self._source.begun.clear()
            if isinstance(piece, Break):
                self.broken = piece
            elif piece is None:
                self._ended = True
            elif piece:
                self.data += piece
                return True
        return False

    def want(self, size: int) -> bool:
        """Whether `size` bytes can be had."""
        while len(self.data) < size:
            if not self.fill():
                return False
        return True

    def drop(self, size: int) -> None:
        """Passes over bytes that are in `data`."""
        del self.data[:size]
        self.position += size

    def offset(self) -> int:
        """The stored offset of what begins at `position`."""
        if self._plain:
            return self.position
        while len(self._starts) > 1 and self._starts[1][0] <= self.position:
            self._starts.popleft()
        return self._starts[0][1] if self._starts else 0

    def members(self) -> list[int]:
        """Where in `data` members begin that follow what begins at `position`."""
        return [start - self.position for start, _ in self._starts if start > self.position]

    def mend(self) -> None:
        """Goes on behind damage, which counts as a byte so that no two places are the same."""
        self.drop(len(self.data))
        self.position += 1
        self.broken = None
        self._source.mend()


def warc_records(handle: IO[bytes], kind: str, most: int) -> Iterator[WarcRecord | WarcDamage]:
    """Every record of a file opened in binary mode, and every stretch that is none.

    Args:
        handle: the stored bytes.
        kind: `gz`, `zst`, or empty when the file is not compressed.
        most: longer blocks are set aside as `too_large`, bytes. Memory is a few times this.
    """
    window = _Window(handle, kind)
    while True:
        _skip_newlines(window)
        if window.data:
            found = _record(window, most)
            # Damage right behind a good record is told in a row of its own.
            told = isinstance(found, WarcDamage) and window.broken is not None and not window.data
            yield found
            if told:
                window.mend()
        elif window.broken is not None:
            yield WarcDamage(window.position, window.broken.offset, window.broken.reason, window.broken.detail)
            window.mend()
        else:
            return


def _skip_newlines(window: _Window) -> None:
    while True:
        if blank := _NEWLINES.match(window.data):
            window.drop(blank.end())
        if window.data or not window.fill():
            return


def _record(window: _Window, most: int) -> WarcRecord | WarcDamage:
    window.want(16)
    if not _VERSION.match(window.data):
        return _resync(window, 0, "warc_header", "no record begins here")
    end = _END_OF_HEAD.search(window.data)
    while end is None and len(window.data) < _HEAD and window.fill():
        end = _END_OF_HEAD.search(window.data)
    if end is None:
        return _resync(window, 1, *_cut(window, "warc_header", "the header block does not end"))
    if inner := _INNER.search(window.data, 0, end.start()):
        return _set_aside(window, inner.start() + 1, "warc_header", "the header block runs into the next record")
    headers = _headers(bytes(window.data[: end.start()]))
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        return _resync(window, 1, "warc_length", f"Content-Length is {length[:40]!r}")
    return _block(window, headers, end.end(), int(length), most)


def _headers(head: bytes) -> dict[str, str]:
    """Fields by lower-case name; a line that begins with a blank goes on with the one before."""
    fields: dict[str, str] = {}
    name = ""
    for line in head.decode("utf-8", "replace").splitlines()[1:]:
        if line[:1] in (" ", "\t") and name:
            fields[name] += " " + line.strip()
        elif ":" in line:
            name, value = line.split(":", 1)
            name = name.strip().lower()
            fields.setdefault(name, value.strip())
    return fields


def _block(window: _Window, headers: dict[str, str], head: int, length: int, most: int) -> WarcRecord | WarcDamage:
    position, offset = window.position, window.offset()
    if length > most:
        return _pass_over(window, head, length, most)
    # Four newlines and the next version line, to see that the block ends where it should.
    window.want(head + length + _LONGEST)
    members = [at for at in window.members() if window.data[at : at + 5] == b"WARC/"]
    if members and members[0] < head + length:
        detail = f"Content-Length {length:,}, but {members[0] - head:,} bytes are there"
        return _resync(window, members[0], "warc_length", detail)
    if len(window.data) < head + length:
        reason, detail = _cut(window, "truncated", "the file ends inside the record")
        return _resync(window, head, reason, detail)
    tail = bytes(window.data[head + length : head + length + _LONGEST])
    rest = tail.lstrip(b"\r\n")
    if rest and not tail.startswith(b"\r\n\r\n") and not _VERSION.match(rest) and not b"WARC/".startswith(rest[:5]):
        return _resync(window, head, "warc_length", f"Content-Length {length:,} is not where the record ends")
    block = bytes(window.data[head : head + length])
    window.drop(head + length)
    return WarcRecord(position, offset, headers, block)


def _cut(window: _Window, reason: str, detail: str) -> tuple[str, str]:
    """The reason and detail of the damage at the end of the window, or the given ones."""
    return (window.broken.reason, window.broken.detail) if window.broken is not None else (reason, detail)


def _set_aside(window: _Window, size: int, reason: str, detail: str) -> WarcDamage:
    position, offset, excerpt = window.position, window.offset(), bytes(window.data[:200])
    window.drop(size)
    return WarcDamage(position, offset, reason, detail, size, excerpt)


def _resync(window: _Window, at: int, reason: str, detail: str) -> WarcDamage:
    """Sets aside everything up to the next record after byte `at` of the window, or up to damage or the end."""
    position, offset, excerpt = window.position, window.offset(), bytes(window.data[:200])
    while True:
        places = [start for start in window.members() if start >= at and window.data[start : start + 5] == b"WARC/"]
        found = _NEXT.search(window.data, max(at - 2, 0))
        if found:
            places.append(window.data.index(b"WARC/", found.start()))
        if places:
            window.drop(min(places))
            break
        keep = min(len(window.data), _LONGEST)
        window.drop(len(window.data) - keep)
        at = 0
        if not window.fill():
            window.drop(len(window.data))
            break
    return WarcDamage(position, offset, reason, detail, window.position - position, excerpt)


def _pass_over(window: _Window, head: int, length: int, most: int) -> WarcDamage:
    """A block that is too long, passed over without keeping it; a length that is not true is found out."""
    position, offset, excerpt = window.position, window.offset(), bytes(window.data[:200])
    end = position + head + length
    while window.position < end:
        found = _NEXT.search(window.data)
        if found and window.position + found.start() < end:
            window.drop(window.data.index(b"WARC/", found.start()))
            detail = f"Content-Length {length:,} is not where the record ends"
            return WarcDamage(position, offset, "warc_length", detail, window.position - position, excerpt)
        window.drop(min(max(len(window.data) - _LONGEST, 0), end - window.position))
        if window.position < end and not window.fill():
            window.drop(min(len(window.data), end - window.position))
            if window.position < end:
                reason, detail = _cut(window, "truncated", "the file ends inside the record")
                return WarcDamage(position, offset, reason, detail, window.position - position, excerpt)
    return WarcDamage(position, offset, "too_large", f"more than {most:,} bytes", length, excerpt)
