"""Web pages: extraction, charsets, HTTP codings, and WARC and WET files in every state of disrepair."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus.options import HtmlOptions, ReadOptions, StepOptions
from modelyard.corpus.read.charset import Decoded, decode
from modelyard.corpus.read.documents import read_unit
from modelyard.corpus.read.html import TooDeep, extract, nesting
from modelyard.corpus.read.http import BadResponse, parse_response
from modelyard.corpus.read.units import Piece, Unit
from modelyard.corpus.step import build

PROSE = "The river turns below the old bridge, and nobody in the village remembers who built it. " * 6


def page(text: str = PROSE, title: str = "A title", head: str = "") -> str:
    nav = '<nav><ul><li><a href="/">Home</a></li><li><a href="/about">About us</a></li></ul></nav>'
    return (
        f'<!doctype html><html lang="en"><head><title>{title}</title>{head}<script>var x = 1;</script></head>'
        f"<body>{nav}<main><h1>{title}</h1><p>{text}</p></main><footer>Imprint, all rights</footer></body></html>"
    )


def http(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def record(
    block: bytes,
    kind: str = "response",
    n: int = 1,
    length: int | None = None,
    mime: str = "application/http",
    **extra: str,
) -> bytes:
    fields = {
        "WARC-Type": kind, "WARC-Target-URI": f"http://site/{n}", "WARC-Date": "2024-05-01T00:00:00Z",
        "WARC-Record-ID": f"<urn:uuid:{n}>", "Content-Type": mime,
        "Content-Length": str(len(block) if length is None else length),
    }  # fmt: skip
    fields |= {name.replace("_", "-"): value for name, value in extra.items()}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
    return b"WARC/1.0\r\n" + head.encode() + b"\r\n" + block + b"\r\n\r\n"


def good(n: int, text: str = PROSE) -> bytes:
    return record(http(page(f"Page number {n}. {text}").encode(), "Content-Type: text/html"), n=n)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor(write_checksum=True).compress}


def read(path: Path, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]], Counter[str]]:
    """Documents with their metadata as a mapping, quarantined records, and counted others, of one file."""
    counts: Counter[str] = Counter()
    unit = Unit(0, (Piece(str(path), "digest", path.stat().st_size),))
    kept: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for table, rejected in read_unit(unit, ReadOptions(**options), counts):
        kept += [row | {"meta": json.loads(row["meta"])} for row in table.to_pylist()]
        bad += rejected.to_pylist()
    ids = [row["id"] for row in kept + bad]
    assert len(set(ids)) == len(ids)
    return kept, bad, counts


def read_warc(folder: Path, records: list[bytes], suffix: str = "", **options: Any) -> Any:
    path = folder / f"a.warc{suffix}"
    path.write_bytes(b"".join(PACK[suffix](r) for r in records))
    return read(path, **options)


def numbers(kept: list[dict[str, Any]]) -> list[int]:
    return [int(row["text"].split("number ", 1)[1].split(".")[0]) for row in kept]


def test_an_html_file_gives_its_main_content_and_particulars(tmp_path: Path) -> None:
    head = '<link rel="canonical" href="http://site/x"><meta property="article:published_time" content="2020-02-03">'
    path = tmp_path / "a.html"
    path.write_text(page(head=head))
    (kept,), bad, _ = read(path)
    assert not bad and PROSE.strip() in kept["text"]
    assert "About us" not in kept["text"] and "var x" not in kept["text"] and "Imprint" not in kept["text"]
    assert kept["meta"] == {
        "charset": "utf-8", "title": "A title", "published": "2020-02-03", "html_language": "en",
        "url": "http://site/x",
    }  # fmt: skip
    (kept,), _, _ = read(path, html={"main_content": False, "links": True, "skip_elements": ["footer"]})
    assert "About us" in kept["text"] and "/about" in kept["text"] and "Imprint" not in kept["text"]
    (kept,), _, _ = read(path, format="text")
    assert kept["text"].startswith("<!doctype html>")


def test_the_extract_step_works_on_a_column(documents: Any) -> None:
    deep = "<div>" * 2000 + "x" + "</div>" * 2000
    step = build(StepOptions.model_validate({"extract": {}}))
    table = step(documents(page(), "<html><body><script>x</script></body></html>", deep, "no markup at all"))
    assert table["reason"].to_pylist() == [None, "extract_no_content", "extract_too_deep", None]
    assert table["title"].to_pylist() == ["A title", None, None, None]
    assert PROSE.strip() in table["text"][0].as_py() and table["text"][3].as_py() == "no markup at all"
    assert table["text"][2].as_py() == deep


def test_nesting_that_would_take_minutes_is_refused() -> None:
    assert nesting("<p>" * 5000 + "<br>" * 5000 + "<li>" * 900, 512) == 0
    with pytest.raises(TooDeep, match="600 deep"):
        extract("<div>" * 600 + "x" + "</div>" * 600, HtmlOptions())


CYRILLIC = "Съешь же ещё этих мягких французских булок, да выпей чаю. Широкая электрификация южных губерний. "
JAPANESE = "色は匂へど散りぬるを我が世誰ぞ常ならむ有為の奥山今日越えて浅き夢見じ酔ひもせず。" * 3
FRENCH = "Dès Noël où un zéphyr haï me vêt de glaçons würmiens, je dîne d’exquis rôtis de bœuf au kir. "


@pytest.mark.parametrize(
    ("text", "codec", "header", "meta", "source"),
    [
        (FRENCH, "utf-8", None, None, "utf-8"), (FRENCH, "utf-8", "ISO-8859-1", "latin1", "utf-8"),
        (FRENCH, "utf-8-sig", "iso-8859-1", None, "bom"), (FRENCH, "utf-16", "utf-8", None, "bom"),
        (FRENCH, "cp1252", "iso-8859-1", None, "header"), (FRENCH, "cp1252", None, "latin1", "meta"),
        (FRENCH, "cp1252", "utf-8", "windows-1252", "meta"), (FRENCH, "cp1252", "nonsense", None, "detection"),
        (CYRILLIC, "cp1251", "windows-1251", None, "header"), (CYRILLIC, "koi8-r", None, "KOI8-R", "meta"),
        (CYRILLIC, "cp1251", None, None, "detection"), (JAPANESE, "shift_jis", None, "Shift_JIS", "meta"),
        (JAPANESE, "euc_jp", "EUC-JP", None, "header"), (JAPANESE, "iso2022_jp", "ISO-2022-JP", None, "header"),
        (JAPANESE, "shift_jis", None, None, "detection"),
    ],
)  # fmt: skip
def test_charsets(text: str, codec: str, header: str | None, meta: str | None, source: str) -> None:
    head = f'<meta charset="{meta}">' if meta else ""
    html = f"<html><head>{head}</head><body>{text * 4}</body></html>"
    found = decode(html.encode(codec), header)
    assert isinstance(found, Decoded)
    assert (found.text, found.source, found.replaced) == (html, source, 0)


def test_broken_utf8_is_never_turned_into_mojibake() -> None:
    data = (CYRILLIC * 20).encode()
    stray = decode(CYRILLIC.encode() * 5 + b"\xff" + CYRILLIC.encode() * 15, "utf-8")
    assert isinstance(stray, Decoded) and stray.replaced == 1 and stray.text.replace("\ufffd", "") == CYRILLIC * 20
    cut = decode(data[:-3], None)
    assert isinstance(cut, Decoded) and cut.charset == "utf-8" and cut.replaced == 1
    noise = bytes(range(128, 160)) * 40
    assert not isinstance(decode(noise, None), Decoded)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "raw deflate", "br", "zstd", "identity", "gzip, br"])
def test_content_codings(coding: str) -> None:
    raw = zlib.compressobj(wbits=-15)
    body = page().encode()
    packed = {
        "gzip": gzip.compress(body), "deflate": zlib.compress(body), "raw deflate": raw.compress(body) + raw.flush(),
        "br": brotli.compress(body), "zstd": zstandard.ZstdCompressor().compress(body), "identity": body,
        "gzip, br": brotli.compress(gzip.compress(body)),
    }[coding]  # fmt: skip
    name = coding.removeprefix("raw ")
    assert parse_response(http(packed, f"Content-Encoding: {name}"), 10**6).body == body
    # Most crawlers store the decoded body under the headers of the coded one.
    if coding != "gzip, br":
        assert parse_response(http(body, f"Content-Encoding: {name}"), 10**6).body == body
    if coding != "identity":
        with pytest.raises(BadResponse, match="more than 100 bytes"):
            parse_response(http(packed, f"Content-Encoding: {name}"), 100)


def test_chunks_are_joined_and_a_false_header_is_seen_through() -> None:
    body = page().encode()
    sizes = [body[at : at + 100] for at in range(0, len(body), 100)]
    chunked = b"".join(b"%x;name=value\r\n%s\r\n" % (len(piece), piece) for piece in sizes) + b"0\r\n\r\n"
    head = "Transfer-Encoding: chunked"
    assert parse_response(http(chunked, head), 10**6).body == body
    cut = parse_response(http(chunked[:-40], head), 10**6).body
    assert body.startswith(cut) and len(cut) > len(body) - 60
    assert parse_response(http(body, head), 10**6).body == body
    assert parse_response(http(b"1234 apples\r\nand pears", head), 10**6).body == b"1234 apples\r\nand pears"
    with pytest.raises(BadResponse, match="unknown coding"):
        parse_response(http(body, "Content-Encoding: rot13"), 10**6)
    with pytest.raises(BadResponse, match="no HTTP status line"):
        parse_response(b"<html>", 10**6)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_warc_gives_pages_with_url_date_and_record_id(tmp_path: Path, suffix: str) -> None:
    html, plain = "Content-Type: text/html; charset=koi8-r", "Content-Type: text/plain"
    records = [
        record(b"software: x\r\n", "warcinfo", mime="application/warc-fields"),
        record(b"GET / HTTP/1.1\r\n\r\n", "request"),
        record(http(page(CYRILLIC * 4).encode("koi8-r"), html), n=2, WARC_Truncated="length"),
        record(http(b"gone", "Content-Type: text/html", status="404 Not Found"), n=3),
        record(http(b"\x89PNG", "Content-Type: image/png"), n=4),
        record(http(PROSE.encode(), plain), n=5),
        record(http(page().encode(), "Content-Type: application/octet-stream"), n=6,
               WARC_Identified_Payload_Type="text/html"),
        record(http(page().encode()), n=7),
        record(http(b"  "), n=8), record(http(b"<html><script>x</script></html>"), n=9),
        record(b"", "revisit", n=10), record(PROSE.encode(), "conversion", n=11, mime="text/plain"),
    ]  # fmt: skip
    kept, bad, counts = read_warc(tmp_path, records, suffix)
    assert [row["meta"]["url"] for row in kept] == [f"http://site/{n}" for n in (2, 5, 6, 7, 11)]
    assert kept[0]["meta"] | {"warc_offset": 0} == {
        "url": "http://site/2", "date": "2024-05-01T00:00:00Z", "warc_record_id": "urn:uuid:2", "warc_offset": 0,
        "warc_truncated": "length", "charset": "koi8-r", "charset_from": "header", "title": "A title",
        "html_language": "en",
    }  # fmt: skip
    assert CYRILLIC.strip() in kept[0]["text"] and kept[1]["text"] == PROSE
    reasons = [("http_status", "404"), ("content_type", "image/png"), ("content_type", ""), ("no_content", "")]
    assert [(b["reason"], b["detail"].removeprefix("no text in the main content")) for b in bad] == reasons
    assert counts == {"warc_warcinfo": 1, "warc_request": 1, "warc_revisit": 1}
    # The offsets are those of a CDX index: from there the stored record can be read alone.
    stored = (tmp_path / f"a.warc{suffix}").read_bytes()
    piece = stored[kept[1]["meta"]["warc_offset"] :]
    if suffix == ".gz":
        piece = zlib.decompressobj(31).decompress(piece)
    elif suffix == ".zst":
        piece = zstandard.ZstdDecompressor().decompressobj().decompress(piece)
    assert piece.startswith(b"WARC/1.0") and b"http://site/5" in piece[:200]


def test_zstandard_with_a_dictionary_and_gzip_as_one_member(tmp_path: Path) -> None:
    words = zstandard.ZstdCompressionDict(page().encode() * 4)
    frames = [zstandard.ZstdCompressor(dict_data=words).compress(good(n)) for n in range(3)]
    content = zstandard.ZstdCompressor().compress(words.as_bytes())
    head = (0x184D2A5D).to_bytes(4, "little") + len(content).to_bytes(4, "little")
    (tmp_path / "a.warc.zst").write_bytes(head + content + b"".join(frames))
    assert numbers(read(tmp_path / "a.warc.zst")[0]) == [0, 1, 2]
    (tmp_path / "b.warc.gz").write_bytes(gzip.compress(b"".join(good(n) for n in range(300))) + b"\0" * 999)
    kept, bad, _ = read(tmp_path / "b.warc.gz")
    assert numbers(kept) == list(range(300)) and not bad and {row["meta"]["warc_offset"] for row in kept} == {0}


DAMAGED = {
    "no version line": (good(1).replace(b"WARC/1.0", b"CRAW/1.0"), "warc_header"),
    "no end of headers": (b"WARC/1.0\r\nWARC-Type: response\r\n", "warc_header"),
    "no length": (good(1).replace(b"Content-Length", b"Content-Longing"), "warc_length"),
    "length is a word": (record(b"x", length=1).replace(b"Length: 1", b"Length: one"), "warc_length"),
    "length too small": (record(http(page().encode()), length=120), "warc_length"),
    "length too large": (record(http(page().encode()), length=2000), "warc_length"),
    "length beyond the file": (record(http(page().encode()), length=90_000), "warc_length"),
    "length absurd": (record(http(page().encode()), length=10**15), "warc_length"),
    "no HTTP header": (record(b"<html>hello"), "http_header"),
    "coding that does not decode": (record(http(b"\x1f\x8b\x08 no", "Content-Encoding: gzip")), "content_encoding"),
    "no charset fits": (record(http(bytes(range(128, 160)) * 40, "Content-Type: text/html")), "invalid_charset"),
    "too large": (good(1, PROSE * 200), "too_large"),
    "binary": (record(http(b"a\0b" * 50, "Content-Type: text/html")), "binary"),
    "deep": (record(http(b"<div>" * 2000, "Content-Type: text/html")), "html_too_deep"),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_record_costs_no_other(tmp_path: Path, case: str, suffix: str) -> None:
    broken, reason = DAMAGED[case]
    kept, bad, _ = read_warc(tmp_path, [good(1), broken, good(2), good(3)], suffix, max_document_bytes=50_000)
    assert numbers(kept) == [1, 2, 3]
    assert [b["reason"] for b in bad] == [reason]
    assert bad[0]["offset"] == len(PACK[suffix](good(1))) and bad[0]["source"].endswith(f"a.warc{suffix}")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_damage_to_the_compression_costs_one_record(tmp_path: Path, suffix: str) -> None:
    packed = [PACK[suffix](good(n)) for n in range(4)]
    middle = bytearray(packed[1])
    middle[len(middle) // 2 : len(middle) // 2 + 8] = b"\xff" * 8
    path = tmp_path / f"a.warc{suffix}"
    path.write_bytes(packed[0] + bytes(middle) + packed[2] + packed[3])
    kept, bad, _ = read(path)
    assert numbers(kept) == [0, 2, 3]
    assert [(b["reason"], b["offset"]) for b in bad] == [("corrupt", len(packed[0]))]
    path.write_bytes(b"".join(packed)[:-60])
    kept, bad, _ = read(path)
    assert numbers(kept) == [0, 1, 2] and [b["reason"] for b in bad] == ["truncated"]
    assert bad[0]["offset"] == sum(map(len, packed[:3]))
    path.write_bytes(packed[0] + packed[1][: len(packed[1]) // 2] + packed[2])
    kept, bad, _ = read(path)
    assert numbers(kept) == [0, 2] and [b["reason"] for b in bad] == ["corrupt"]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data(), suffix=st.sampled_from(["", ".gz", ".zst"]))
def test_any_damage_is_told_and_leaves_the_rest_readable(tmp_path_factory: Any, data: Any, suffix: str) -> None:
    packed = [PACK[suffix](good(n, "Short and sweet.")) for n in range(8)]
    stored = bytearray(b"".join(packed))
    at = data.draw(st.integers(0, len(stored) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=20))
    change = data.draw(st.sampled_from(["overwrite", "insert", "delete", "truncate"]))
    end = len(stored) if change == "truncate" else at if change == "insert" else min(at + len(junk), len(stored))
    stored[at:end] = b"" if change in ("delete", "truncate") else junk
    path = tmp_path_factory.mktemp("warc") / f"a.warc{suffix}"
    path.write_bytes(bytes(stored) or b"x")
    kept, bad, _ = read(path)
    bounds = [sum(map(len, packed[: n + 1])) for n in range(8)]
    before = sum(b <= at for b in bounds)
    assert [row["meta"].get("url") for row in kept[:before]] == [f"http://site/{n}" for n in range(before)]
    if change == "truncate" and at not in (0, *bounds):
        # A member that lacks its last bytes alone, the checksum, still gives its record.
        # A plain record that lacks only the line ends behind it is whole, and nothing is to be told.
        line_ends = not suffix and any(b - 4 <= at < b for b in bounds)
        assert before <= len(kept) <= before + 1
        assert len(bad) == 1 or (line_ends and len(kept) == before + 1)
    elif change != "truncate":
        # The changed record, and at most the two beside it where a border was hit.
        assert len(kept) >= 8 - (3 if suffix else 2)
        assert len(kept) + len(bad) >= 7


def test_wet_files_and_empty_and_absent_ones(tmp_path: Path) -> None:
    wet = [record(f"Wort {n} über alles".encode(), "conversion", n=n, mime="text/plain") for n in range(3)]
    path = tmp_path / "a.warc.wet.gz"
    path.write_bytes(b"".join(map(gzip.compress, wet)))
    kept, bad, _ = read(path)
    assert [row["text"] for row in kept] == [f"Wort {n} über alles" for n in range(3)] and not bad
    (tmp_path / "empty.warc.gz").write_bytes(b"")
    assert [b["reason"] for b in read(tmp_path / "empty.warc.gz")[1]] == ["empty_file"]
    (tmp_path / "text.warc").write_bytes(b"this is no archive\n" * 100)
    assert [b["reason"] for b in read(tmp_path / "text.warc")[1]] == ["warc_header"]
    (tmp_path / "text.warc.gz").write_bytes(b"this is no archive\n" * 100)
    assert [b["reason"] for b in read(tmp_path / "text.warc.gz")[1]] == ["corrupt"]
