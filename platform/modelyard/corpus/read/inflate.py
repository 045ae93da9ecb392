"""The inflated bytes of a file made of records, with a way on behind damage.

WARC files hold one gzip member or Zstandard frame a record, so that one broken member costs one record:
`Inflated` says where members begin, stops at damage, and finds the next member that begins a record.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import IO, Any

import zstandard

_READ = 1 << 16  # stored bytes a read
_OUTPUT = 1 << 20  # inflated bytes a step of gzip
_SLICE = 1 << 12  # stored bytes a step of Zstandard, whose output cannot be bounded otherwise: at most 128 MB
_HISTORY = 1 << 20  # stored bytes of the current member in which a next member is looked for after damage
_LOOK = 1 << 12  # stored bytes that must be enough to see how a member begins
_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_DICTIONARY = 0x184D2A5D  # the skippable frame of the "WARC zstd" specification
_MAGIC = {"gz": b"\x1f\x8b\x08", "zst": b"\x28\xb5\x2f\xfd"}


@dataclass(frozen=True)
class Break:
    """Damage: the bytes from stored offset `offset` on do not inflate; `reason` and `detail` for the audit."""

    offset: int
    reason: str
    detail: str


class _Plain:
    """Stands where a decompressor does: bytes as they are."""

    eof = False
    unused_data = b""

    def decompress(self, data: bytes) -> bytes:
        return data


class Inflated:
    """Reads a file opened in binary mode piece by piece. `kind` is `gz`, `zst` or empty for none.

    Memory: 64 KB of stored bytes, the last MB of the current member, and one piece of output.
    """

    def __init__(self, handle: IO[bytes], kind: str) -> None:
        self._handle, self._kind = handle, kind
        self._stored = b""  # read and not yet given to the decompressor
        self._offset = 0  # of the first byte of `_stored` in the file
        self._history = bytearray()  # bytes of the current member that the decompressor has been given
        self._dictionary: Any = None
        self._member: Any = _Plain() if not kind else None
        self._start = 0
        self._break: Break | None = None
        self.begun: list[int] = []
        """Stored offsets of members that have begun and that nobody has taken from this list yet."""

    def read(self) -> bytes | Break | None:
        """The next piece (may be empty), None at the end, or a Break, which repeats until `mend`."""
        if self._break is None:
            if self._member is None and not self._begin():
                return None
            if not self._stored and not self._more():
                if not self._kind:
                    return None
                self._break = Break(self._start, "truncated", "the file ends inside a compressed member")
        return self._break or self._step()

    def _more(self) -> bool:
        block = self._handle.read(_READ)
        self._stored += block
        return bool(block)

    def _take(self, size: int) -> bytes:
        piece, self._stored = self._stored[:size], self._stored[size:]
        self._offset += len(piece)
        return piece

    def _begin(self) -> bool:
        """Opens the member that begins at the next stored byte; False at the end of the file."""
        while True:
            if not self._stored and not self._more():
                return False
            if self._kind == "gz" and not self._stored[0]:
                # Zero padding after a member is allowed (gzip manual, "padding").
                self._take(len(self._stored) - len(self._stored.lstrip(b"\0")))
            elif self._kind != "zst" or not self._skip():
                break
        self._member, self._start = self._fresh(), self._offset
        self._history.clear()
        self.begun.append(self._start)
        return True

    def _fresh(self) -> Any:
        if self._kind == "gz":
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(dict_data=self._dictionary).decompressobj()

    def _skip(self) -> bool:
        """Passes over a skippable frame, and keeps the dictionary that one may hold."""
        while len(self._stored) < 8 and self._more():
            pass
        if len(self._stored) < 8:
            return False
        magic, size = struct.unpack_from("<II", self._stored)
        if magic not in _SKIPPABLE:
            return False
        self._take(8)
        keep, content = magic == _DICTIONARY and size <= 1 << 27, bytearray()
        while size and (self._stored or self._more()):
            piece = self._take(min(size, len(self._stored)))
            size -= len(piece)
            content += piece if keep else b""
        if keep:
            self._dictionary = _dictionary(bytes(content))
        return True

    def _step(self) -> bytes | Break:
        piece = self._take(_SLICE if self._kind == "zst" else len(self._stored))
        try:
            if self._kind == "gz":
                out = self._member.decompress(piece, _OUTPUT)
                back = self._member.unconsumed_tail or self._member.unused_data
            else:
                out, back = self._member.decompress(piece), self._member.unused_data
        except (zlib.error, zstandard.ZstdError) as error:
            self._history += piece
            self._break = Break(self._start, "corrupt", str(error))
            return self._break
        if back:
            self._stored, self._offset = back + self._stored, self._offset - len(back)
        if self._kind:
            self._history += piece[: len(piece) - len(back)]
            if len(self._history) > 2 * _HISTORY:
                del self._history[:-_HISTORY]
        if self._member.eof:
            self._member = None
        return bytes(out)

    def mend(self) -> None:
        """Goes on behind a Break: at the next member that begins with a WARC record, or at the end of the file."""
        magic = _MAGIC[self._kind]
        # What the decompressor has eaten may hold the next member: a flipped bit is often noticed late.
        data = bytes(self._history) + self._stored
        first = self._offset - len(self._history)
        self._member = self._break = None
        at = 1
        while True:
            found = data.find(magic, at)
            if found < 0:
                passed = max(len(data) - len(magic) + 1, 0)
                first, data, at = first + passed, data[passed:], max(at - passed, 0)
                block = self._handle.read(_READ)
                if not block:
                    self._stored, self._offset = b"", first + len(data)
                    return
                data += block
                continue
            while len(data) - found < _LOOK and (block := self._handle.read(_READ)):
                data += block
            if self._opens(data[found : found + _LOOK]):
                self._stored, self._offset = data[found:], first + found
                return
            at = found + 1

    def _opens(self, data: bytes) -> bool:
        try:
            return bool(self._fresh().decompress(data).startswith(b"WARC/"))
        except (zlib.error, zstandard.ZstdError):
            return False


def _dictionary(content: bytes) -> Any:
    if content.startswith(_MAGIC["zst"]):
        content = zstandard.ZstdDecompressor().decompressobj().decompress(content)
    return zstandard.ZstdCompressionDict(content)
