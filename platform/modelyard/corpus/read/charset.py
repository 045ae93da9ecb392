"""Bytes of a page to text: by what they are, what the server and the page say, and last by detection.

Wrongly declared charsets are common (the usual case: UTF-8 behind a header that says ISO-8859-1) and text that
is valid UTF-8 beyond ASCII is hardly ever anything else, so bytes come before declarations. Labels mean what
the WHATWG Encoding standard says they mean; a decoder must take every byte, or another one is tried.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_BOMS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
_META = re.compile(rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([A-Za-z0-9_.:-]{2,40})""", re.IGNORECASE)
_XML = re.compile(rb"""^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([A-Za-z0-9_.:-]{2,40})["']""")
_PRESCAN = 4096  # bytes in which a declaration is looked for; browsers look at 1024
_SHIFTS = {"iso-2022-jp", "iso2022_jp", "hz", "hz-gb-2312", "iso-2022-kr", "iso-2022-cn", "utf-7"}
_C1 = re.compile("[\u0080-\u0084\u0086-\u009f]")
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]+")
_REPLACED = 1000  # bytes of UTF-8 that one broken byte is forgiven for


@dataclass(frozen=True)
class Decoded:
    """Text, the charset it was decoded from, who said so, and how many broken sequences became U+FFFD."""

    text: str
    charset: str
    source: str
    replaced: int = 0


@dataclass(frozen=True)
class Undecodable:
    """No charset takes all bytes; the first byte that UTF-8 refuses is at `offset`."""

    offset: int
    detail: str


def decode(data: bytes, header: str | None = None) -> Decoded | Undecodable:
    """The text of a page.

    In this order: a byte order mark; valid UTF-8; the HTTP header's charset; the page's own declaration;
    UTF-8 with few broken bytes among many whole sequences, which become U+FFFD; detection.

    Args:
        data: bytes of an HTML or text file.
        header: charset parameter of the HTTP Content-Type.
    """
    for mark, name in _BOMS:
        if data.startswith(mark):
            return _forgiving(data[len(mark) :], name, "bom")
    declared = [(label, source) for label, source in ((header, "header"), (_declared(data), "meta")) if label]
    shifts = any(label.lower() in _SHIFTS for label, _ in declared) and (b"\x1b" in data or b"~{" in data)
    broken = 0
    if not shifts and b"\0" not in data[:64]:
        try:
            return Decoded(data.decode(), "utf-8", "utf-8")
        except UnicodeDecodeError as error:
            broken = error.start
    for label, source in declared:
        codec = _codec(label)
        if codec and codec != "utf-8" and (text := _strict(data, codec)) is not None:
            return Decoded(text, codec, source)
    return _last(data, broken)


def _last(data: bytes, broken: int) -> Decoded | Undecodable:
    from resiliparse.parse.encoding import detect_encoding

    found = _forgiving(data, "utf-8", "utf-8")
    # More whole sequences than broken ones, or a page that the crawler cut inside its last character.
    whole = sum(map(len, _BEYOND_ASCII.findall(found.text))) - found.replaced
    cut = found.replaced == 1 and broken >= len(data) - 3 and whole > 0
    if cut or (whole >= 3 * found.replaced and found.replaced <= 1 + len(data) // _REPLACED):
        return found
    name = detect_encoding(data, html5_compatible=True)
    if name and name.lower() != "utf-8" and (text := _strict(data, name)) is not None:
        return Decoded(text, name.lower(), "detection")
    return Undecodable(broken, f"no charset fits; UTF-8 fails at byte {broken}")


def _declared(data: bytes) -> str | None:
    found = _META.search(data, 0, _PRESCAN) or _XML.search(data[:200])
    return found.group(1).decode() if found else None


def _codec(label: str) -> str | None:
    """The Python codec for a label of the WHATWG Encoding standard; a page's own `utf-16` means UTF-8 there."""
    from resiliparse.parse.encoding import map_encoding_to_html5

    name = map_encoding_to_html5(label, fallback_utf8=False)
    if name is None:
        return None
    return "utf-8" if name.lower().startswith(("utf-8", "utf-16")) else str(name).lower()


def _strict(data: bytes, name: str) -> str | None:
    """The text when every byte decodes and no C1 control comes out, as it would from a wrong codec."""
    try:
        text = data.decode(name)
    except (UnicodeDecodeError, LookupError):
        return None
    return None if _C1.search(text) else text


def _forgiving(data: bytes, name: str, source: str) -> Decoded:
    text = data.decode(name, "replace")
    return Decoded(text, name, source, text.count("\ufffd") if "\ufffd" in text else 0)
