"""Bytes from files: inflated on the way, cut into lines, with a truncated end made known."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

from modelyard.storage import filesystem

_CHUNK = 1 << 16  # compressed bytes a step: what they inflate to must fit in memory


class Damaged(Exception):
    """The rest of a file cannot be read: `reason` for the audit, with a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@contextmanager
def opened(uri: str) -> Iterator[IO[bytes]]:
    """The stored bytes of a file.

    Raises:
        Damaged: the file cannot be opened, or a read inside the block fails (`unreadable`).
    """
    try:
        fs, path = filesystem(uri)
        with fs.open(path, "rb") as handle:
            yield cast(IO[bytes], handle)
    except OSError as error:
        raise Damaged("unreadable", f"{type(error).__name__}: {error.strerror or error}") from error


def compression(uri: str) -> str:
    """`gz` or `zst` by suffix, or empty."""
    suffix = uri.lower().rsplit(".", 1)[-1]
    return suffix if suffix in ("gz", "zst") else ""


def chunks(uri: str, start: int = 0) -> Iterator[bytes]:
    """The content of a file from byte `start` on, inflated by suffix (.gz, .zst).

    Raises:
        Damaged: the file cannot be opened (`unreadable`), ends in the middle of a compressed member
            (`truncated`) or is corrupt (`corrupt`). What came before has been yielded.
    """
    with opened(uri) as handle:
        if start:
            handle.seek(start)
        if compression(uri):
            yield from _inflate(handle, compression(uri) == "gz")
        else:
            while block := handle.read(1 << 20):
                yield block


def _inflate(handle: IO[bytes], gz: bool) -> Iterator[bytes]:
    import zstandard

    def fresh() -> Any:
        return zlib.decompressobj(wbits=31) if gz else zstandard.ZstdDecompressor().decompressobj()

    member, begun = fresh(), False
    while block := handle.read(_CHUNK):
        while block:
            begun = True
            try:
                yield member.decompress(block)
            except (zlib.error, zstandard.ZstdError) as error:
                raise Damaged("corrupt", str(error)) from error
            block = b""
            if member.eof:
                # Zero padding after the last member is allowed (gzip manual, "padding").
                block = member.unused_data.lstrip(b"\0") if gz else member.unused_data
                member, begun = fresh(), False
    if begun:
        raise Damaged("truncated", "the file ends inside a compressed member")


def whole(uri: str, most: int) -> bytes:
    """The whole inflated content. Raises Damaged, also when it is longer than `most` bytes (`too_large`)."""
    parts, size = [], 0
    for chunk in chunks(uri):
        parts.append(chunk)
        size += len(chunk)
        if size > most:
            raise Damaged("too_large", f"more than {most:,} bytes")
    return b"".join(parts)


def lines(uri: str, start: int, end: int | None, most: int) -> Iterator[tuple[int, bytes | None]]:
    """(byte offset, line without its end) of each line that begins in [start, end); None = longer than `most`."""
    # A line that begins exactly at `start` is ours: look at the byte before to know.
    offset = max(start - 1, 0)
    rest, skipping, dropped = bytearray(), start > 0, 0
    for chunk in chunks(uri, offset):
        rest += chunk
        at = 0
        while (cut := rest.find(b"\n", at)) >= 0:
            if end is not None and offset >= end:
                return
            if skipping:
                skipping = False
            else:
                long = dropped or cut - at > most
                yield offset, None if long else bytes(rest[at:cut])
            offset += dropped + cut + 1 - at
            at, dropped = cut + 1, 0
        del rest[:at]
        if len(rest) > most:
            dropped += len(rest)
            rest.clear()
    if (rest or dropped) and not skipping and (end is None or offset < end):
        yield offset, None if dropped or len(rest) > most else bytes(rest)
