"""HTTP responses as archives store them: status, headers, and the body with its transfer codings undone."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import brotli
import zstandard

_STATUS = re.compile(rb"HTTP/\d(?:\.\d)?\s+(\d{3})[^\n]*\n")
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")
_CHUNK = re.compile(rb"[ \t]*([0-9A-Fa-f]{1,8})[ \t]*(?:;[^\r\n]*)?\r?\n")
_CHARSET = re.compile(r"charset\s*=\s*[\"']?\s*([A-Za-z0-9_.:-]+)", re.IGNORECASE)


class BadResponse(Exception):
    """The block of a record is no readable HTTP response: `reason` for the audit, with a detail."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Response:
    """A response: `media_type` in lower case without parameters, `charset` as the header gives it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def media_type(self) -> str:
        """Such as `text/html`; empty when no header says."""
        return media_type(self.headers.get("content-type", ""))[0]

    @property
    def charset(self) -> str | None:
        """The charset parameter of Content-Type."""
        return media_type(self.headers.get("content-type", ""))[1]


def media_type(value: str) -> tuple[str, str | None]:
    """(media type in lower case, charset or None) of a Content-Type value."""
    found = _CHARSET.search(value)
    return value.split(";", 1)[0].strip().lower(), found.group(1) if found else None


def parse_response(block: bytes, most: int) -> Response:
    """A stored response with chunks joined and content inflated, up to `most` bytes of body.

    Crawlers often store a body already decoded and leave its headers as they were, so a coding is undone
    only where the bytes have its form.

    Raises:
        BadResponse: no status line (`http_header`), a coding that does not decode or is unknown
            (`content_encoding`), or a body that is too long (`too_large`).
    """
    status = _STATUS.match(block)
    if status is None:
        raise BadResponse("http_header", "no HTTP status line")
    end = _END_OF_HEAD.search(block, status.end() - 2)
    head, body = (
        (block[status.end() :], b"") if end is None else (block[status.end() : end.start()], block[end.end() :])
    )
    headers: dict[str, str] = {}
    for line in head.decode("latin-1").splitlines():
        name, colon, value = line.partition(":")
        if colon and not line[:1].isspace():
            headers.setdefault(name.strip().lower(), value.strip())
    if "chunked" in headers.get("transfer-encoding", "").lower():
        body = _unchunk(body)
    for coding in reversed([c.strip().lower() for c in headers.get("content-encoding", "").split(",")]):
        body = _decode(body, coding, most)
    return Response(int(status.group(1)), headers, body)


def _unchunk(body: bytes) -> bytes:
    """The chunks joined; a body that is not chunked, whatever its header says, as it is."""
    parts: list[bytes] = []
    at = 0
    while found := _CHUNK.match(body, at):
        size = int(found.group(1), 16)
        if not size:
            return b"".join(parts)
        parts.append(body[found.end() : found.end() + size])
        at = found.end() + size
        at += 2 if body[at : at + 2] == b"\r\n" else 1 if body[at : at + 1] == b"\n" else 0
    # A body cut short by the crawler ends inside a chunk; one that was never chunked does not begin with one.
    return b"".join(parts) if parts and at >= len(body) else body


def _decode(body: bytes, coding: str, most: int) -> bytes:
    if coding in ("", "identity", "none", "utf-8") or not body:
        return body
    try:
        if coding in ("gzip", "x-gzip"):
            return (
                _bounded(zlib.decompressobj(31).decompress(body, most + 1), most) if body[:2] == b"\x1f\x8b" else body
            )
        if coding == "deflate":
            return _bounded(_deflate(body, most), most)
        if coding == "br":
            return _bounded(_brotli(body, most), most)
        if coding == "zstd":
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                return _bounded(reader.read(most + 1), most)
    except (zlib.error, brotli.error, zstandard.ZstdError) as error:
        if _is_text(body):
            return body
        raise BadResponse("content_encoding", f"{coding}: {error}") from error
    raise BadResponse("content_encoding", f"unknown coding {coding[:40]!r}")


def _deflate(body: bytes, most: int) -> bytes:
    try:
        return zlib.decompressobj().decompress(body, most + 1)
    except zlib.error:
        return zlib.decompressobj(-15).decompress(body, most + 1)


def _brotli(body: bytes, most: int) -> bytes:
    decoder, size = brotli.Decompressor(), 0
    parts: list[bytes] = []
    for at in range(0, len(body), 4096):
        parts.append(decoder.process(body[at : at + 4096]))
        size += len(parts[-1])
        if size > most:
            break
    return b"".join(parts)


def _bounded(body: bytes, most: int) -> bytes:
    if len(body) > most:
        raise BadResponse("too_large", f"inflates to more than {most:,} bytes")
    return body


def _is_text(body: bytes) -> bool:
    """Whether bytes look like markup that was stored decoded: no NUL, and a tag near the beginning."""
    return b"\0" not in body[:1024] and b"<" in body[:1024]
