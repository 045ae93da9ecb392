"""Records out of web pages: HTML files, and WARC and WET archives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.charset import Undecodable, decode
from modelyard.corpus.read.html import TooDeep, extract
from modelyard.corpus.read.http import BadResponse, media_type, parse_response
from modelyard.corpus.read.records import Bad, Record, Skipped
from modelyard.corpus.read.streams import compression, opened, whole
from modelyard.corpus.read.units import Piece
from modelyard.corpus.read.warc import WarcDamage, WarcRecord, warc_records

_HTML = frozenset({"text/html", "application/xhtml+xml"})
_TEXT = frozenset({"text/plain"})
_PAGE_TYPES = frozenset({"response", "resource", "conversion"})


def html_file(piece: Piece, options: ReadOptions) -> Record | Bad:
    """The page of an HTML file."""
    data = whole(piece.uri, options.max_document_bytes)
    return _page(0, None, data, True, None, {}, options)


def warc_file(piece: Piece, options: ReadOptions) -> Iterator[Record | Bad | Skipped]:
    """The pages of a WARC or WET file; its other records are named by type.

    Raises:
        Damaged: the file cannot be opened or read.
    """
    with opened(piece.uri) as handle:
        for found in warc_records(handle, compression(piece.uri), options.max_document_bytes):
            if isinstance(found, WarcDamage):
                excerpt = found.excerpt.decode("utf-8", "backslashreplace")
                yield Bad(found.position, found.reason, found.detail[:200], found.size, excerpt, found.offset)
            elif found.type in _PAGE_TYPES and not _about_the_crawl(found):
                yield _archived(found, options)
            else:
                yield Skipped(f"warc_{found.type[:24] or 'untyped'}")


def _archived(record: WarcRecord, options: ReadOptions) -> Record | Bad:
    headers = record.headers
    meta = {
        "url": headers.get("warc-target-uri", "").strip("<>"), "date": headers.get("warc-date"),
        "warc_record_id": headers.get("warc-record-id", "").strip("<>"), "warc_offset": record.offset,
        "warc_truncated": headers.get("warc-truncated"),
    }  # fmt: skip
    kind, charset = media_type(headers.get("content-type", ""))
    body = record.block
    try:
        if kind == "application/http":
            response = parse_response(body, options.max_document_bytes)
            if response.status // 100 != 2:
                return _bad(record, "http_status", str(response.status))
            kind, charset, body = response.media_type, response.charset, response.body
    except BadResponse as error:
        return _bad(record, error.reason, error.detail)
    # What the crawler found the payload to be is worth more than what the server called it.
    kind = headers.get("warc-identified-payload-type", kind).lower() or _sniff(body)
    if kind not in _HTML | _TEXT:
        return _bad(record, "content_type", kind)
    return _page(record.position, record.offset, body, kind in _HTML, charset, meta, options)


def _about_the_crawl(record: WarcRecord) -> bool:
    """Whether it is a log that wget wrote into the archive."""
    return record.headers.get("warc-target-uri", "").strip("<").startswith("metadata:")


def _sniff(body: bytes) -> str:
    head = body[:1024].lstrip().lower()
    return "text/html" if b"<html" in head or head.startswith((b"<!doctype html", b"<head", b"<body")) else ""


def _bad(record: WarcRecord, reason: str, detail: str) -> Bad:
    excerpt = record.headers.get("warc-target-uri", "")[:200]
    return Bad(record.position, reason, detail[:200], len(record.block), excerpt, record.offset)


def _page(
    position: int, offset: int | None, data: bytes, markup: bool, charset: str | None, meta: dict[str, Any],
    options: ReadOptions,
) -> Record | Bad:  # fmt: skip
    """The document of a page's bytes. Particulars that it lacks are left out of the metadata."""
    place = str(meta.get("url") or "")[:200]
    if not data.strip():
        return Bad(position, "empty_page", "", len(data), place, offset)
    found = decode(data, charset)
    if isinstance(found, Undecodable):
        return Bad(position, "invalid_charset", found.detail, len(data), place, offset)
    if "\0" in found.text[:1000]:
        return Bad(position, "binary", "a NUL character", len(data), place, offset)
    meta |= {"charset": found.charset, "charset_replaced": found.replaced or None}
    if found.charset != "utf-8":
        meta["charset_from"] = found.source
    text = found.text
    if markup:
        try:
            page = extract(text, options.html)
        except TooDeep as error:
            return Bad(position, "html_too_deep", str(error), len(data), place, offset)
        text = page.text
        meta |= {"title": page.title, "published": page.published, "html_language": page.language}
        meta["url"] = meta.get("url") or page.url
    text = text.encode("utf-8", "replace").decode()
    if not text.strip():
        return Bad(position, "no_content", "no text in the main content", len(data), place, offset)
    return Record(position, text, meta={name: value for name, value in meta.items() if value not in (None, "")})
