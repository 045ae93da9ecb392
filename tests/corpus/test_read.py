"""Readers: every format, and every way a record can be bad, with the place of the damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.docstrings import docstrings
from modelyard.corpus.read.documents import read_unit
from modelyard.corpus.read.streams import lines
from modelyard.corpus.read.units import Piece, Unit, units
from modelyard.storage import FileRef


def read(*files: Path, **options: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(documents, quarantined records) of files."""
    refs = [FileRef(str(file), file.stat().st_size if file.exists() else 1, file.name) for file in files]
    kept: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for unit in units(refs, ReadOptions(**options)):
        for table, rejected in read_unit(unit, ReadOptions(**options)):
            kept += table.to_pylist()
            bad += rejected.to_pylist()
    return kept, bad


def put(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    names = ["a.md", "b.rst", "METADATA", "LICENSE", "c.txt"]
    kept, bad = read(*[put(tmp_path / n, f"text of {n}".encode()) for n in names])
    assert [d["text"] for d in kept] == [f"text of {n}" for n in names] and not bad
    assert [d["source"] for d in kept] == [str(tmp_path / n) for n in names]
    assert len({d["id"] for d in kept}) == 5


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    kept, _ = read(put(tmp_path / "a.txt", b"\xef\xbb\xbfhello"))
    assert kept[0]["text"] == "hello"


@pytest.mark.parametrize(
    ("content", "reason", "offset"),
    [
        (b"", "empty_file", 0), (b" \n\t", "empty_file", 0), (b"good \xff\xfe bad", "invalid_utf8", 5),
        (b"cut \xe4\xbd", "invalid_utf8", 4), (b"nul \x00 byte", "binary", 4), (b"x" * 200, "too_large", 0),
    ],
)  # fmt: skip
def test_bad_text_files_are_set_aside_with_place_and_reason(
    tmp_path: Path, content: bytes, reason: str, offset: int
) -> None:
    kept, bad = read(put(tmp_path / "a.txt", content), put(tmp_path / "b.txt", b"fine"), max_document_bytes=100)
    assert [d["text"] for d in kept] == ["fine"]
    assert [(b["reason"], b["offset"], b["source"], b["step"]) for b in bad] == [
        (reason, offset, str(tmp_path / "a.txt"), "read")
    ]


def test_a_file_that_vanished_is_unreadable(tmp_path: Path) -> None:
    kept, bad = read(tmp_path / "gone.txt", put(tmp_path / "b.txt", b"fine"))
    assert len(kept) == 1 and [b["reason"] for b in bad] == ["unreadable"]


JSONL = b"".join(
    [
        b'{"text": "one", "url": "http://a", "n": 1}\n', b"\n", b"{broken\n", b'{"other": 1}\n', b'{"text": 5}\n',
        b'{"text": "  "}\n', b'[1, 2]\n', b'{"text": "bad \xff"}\n', b'{"text": "\\ud800"}\n',
        b'{"text": "' + b"x" * 300 + b'"}\n', '{"text": "l\u00e4st"}'.encode(),
    ]
)  # fmt: skip
BAD_JSONL = ["invalid_json", "missing_text", "text_not_string", "empty_text", "invalid_json", "invalid_utf8",
             "invalid_unicode", "too_large"]  # fmt: skip


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_with_every_kind_of_bad_line(tmp_path: Path, suffix: str) -> None:
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    kept, bad = read(put(tmp_path / f"a.jsonl{suffix}", pack(JSONL)), max_document_bytes=200)
    assert [d["text"] for d in kept] == ["one", "l\u00e4st"]
    assert json.loads(kept[0]["meta"]) == {"url": "http://a", "n": 1}
    assert [b["reason"] for b in bad] == BAD_JSONL
    starts = [n for n in range(len(JSONL)) if n == 0 or JSONL[n - 1] == 10]
    assert [b["offset"] for b in bad if b["reason"] != "invalid_utf8"] == [starts[n] for n in (2, 3, 4, 5, 6, 8, 9)]


def test_a_field_may_be_text_and_prompt_at_once(tmp_path: Path) -> None:
    kept, bad = read(put(tmp_path / "a.jsonl", b'{"task": "why?"}'), text="task", prompt="task")
    assert [(d["text"], d["prompt"]) for d in kept] == [("why?", "why?")] and not bad


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"\n", b"")), max_size=20), st.integers(1, 40))
def test_ranges_of_a_file_give_every_line_once(tmp_path_factory: Any, parts: list[bytes], size: int) -> None:
    path = put(tmp_path_factory.mktemp("lines") / "a.jsonl", b"\n".join(parts))
    total = path.stat().st_size
    whole = list(lines(str(path), 0, None, 1000))
    cut = [line for start in range(0, total, size) for line in lines(str(path), start, min(start + size, total), 1000)]
    assert cut == whole


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_archive_keeps_what_came_before(tmp_path: Path, suffix: str) -> None:
    import os

    rows = b"".join(b'{"text": "%s"}\n' % os.urandom(300).hex().encode() for _ in range(2000))
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = pack(rows)
    kept, bad = read(put(tmp_path / f"a.jsonl{suffix}", packed[: len(packed) // 2]))
    assert 500 < len(kept) < 1500
    assert bad[-1]["reason"] == "truncated"
    _, bad = read(put(tmp_path / f"b.jsonl{suffix}", b"\x28\xb5\x2f\xfd garbage" if suffix == ".zst" else b"no gzip"))
    assert [b["reason"] for b in bad] == ["corrupt"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_several_members_in_one_archive(tmp_path: Path, suffix: str) -> None:
    pack = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    packed = pack(b'{"text": "one"}\n') + pack(b'{"text": "two"}\n')
    kept, bad = read(put(tmp_path / f"a.jsonl{suffix}", packed))
    assert [d["text"] for d in kept] == ["one", "two"] and not bad


def test_parquet_with_other_columns_and_bad_rows(tmp_path: Path) -> None:
    table = pa.table({"body": ["one", None, "", "two"], "n": [1, 2, 3, 4]})
    pq.write_table(table, tmp_path / "a.parquet")
    kept, bad = read(tmp_path / "a.parquet", text="body")
    assert [(d["text"], json.loads(d["meta"])) for d in kept] == [("one", {"n": 1}), ("two", {"n": 4})]
    assert [(b["reason"], b["offset"]) for b in bad] == [("missing_text", 1), ("empty_text", 2)]
    kept, bad = read(tmp_path / "a.parquet")
    assert not kept and [b["reason"] for b in bad] == ["missing_column"] and "body" in bad[0]["detail"]
    data = (tmp_path / "a.parquet").read_bytes()
    kept, bad = read(put(tmp_path / "cut.parquet", data[:-10]), text="body")
    assert not kept and [b["reason"] for b in bad] == ["unreadable"]


SOURCE = '''
import os

class Box(Base):
    """A box that holds one value."""

    def get(
        self, default: int = 0,
    ) -> int:
        # why
        """Returns the value of the box.

            Indented more.
        End.
        """
        return 1

    async def put(self): "Puts a value into the box."

    def silent(self):
        return None

if True:
    def inner(x):
        """Defined under a condition here."""
'''


def test_docstrings_with_their_signatures() -> None:
    got = [(d.name, d.signature, d.text) for d in docstrings(SOURCE)]
    assert got == [
        ("Box", "class Box(Base):", "A box that holds one value."),
        ("Box.get", "def get(\n    self, default: int = 0,\n) -> int:",
         "Returns the value of the box.\n\n    Indented more.\nEnd."),
        ("Box.put", "async def put(self):", "Puts a value into the box."),
        ("inner", "def inner(x):", "Defined under a condition here."),
    ]  # fmt: skip


def test_python_files_as_source_or_docstrings(tmp_path: Path) -> None:
    good, wrong = put(tmp_path / "a.py", SOURCE.encode()), put(tmp_path / "b.py", b"def f(:\n")
    empty = put(tmp_path / "__init__.py", b"\n")
    kept, bad = read(good, wrong, empty)
    assert len(kept) == 2 and kept[0]["text"] == SOURCE and [b["reason"] for b in bad] == ["empty_file"]
    kept, bad = read(good, wrong, empty, python="docstrings")
    assert kept[0]["prompt"] == "class Box(Base):" and len(kept) == 4
    assert [b["reason"] for b in bad] == ["bad_syntax"] and "line 1" in bad[0]["detail"]
    assert json.loads(kept[1]["meta"]) == {"name": "Box.get", "line": 7}


def test_nested_source_that_python_refuses_is_set_aside(tmp_path: Path) -> None:
    kept, bad = read(put(tmp_path / "deep.py", b"(" * 5000 + b")" * 5000), python="docstrings")
    assert not kept and [b["reason"] for b in bad] == ["bad_syntax"]


def test_units_follow_from_the_files_alone(tmp_path: Path) -> None:
    refs = [FileRef(f"/x/{n}.txt", 1_000_000, f"d{n % 3}") for n in range(40)]
    cut = units(refs, ReadOptions())
    assert [p.uri for u in cut for p in u.pieces] == [r.uri for r in refs]
    assert [u.bytes for u in cut] == [8_000_000] * 5
    assert [p.copy for u in cut for p in u.pieces][:7] == [0, 0, 0, 1, 1, 1, 2]
    assert len({u.key for u in cut}) == 5 and [u.key for u in units(refs, ReadOptions())] == [u.key for u in cut]
    long = units([FileRef("/x/a.jsonl", 60_000_000, "d")], ReadOptions())
    assert len(long) == 8 and long[0].pieces[0].end == long[1].pieces[0].start
    assert len(units([FileRef("/x/a.jsonl.gz", 60_000_000, "d")], ReadOptions())) == 1


def test_equal_files_get_different_ids_that_do_not_depend_on_their_place(tmp_path: Path) -> None:
    def ids(folder: str) -> list[str]:
        pieces = tuple(Piece(f"{folder}/{n}.txt", "same", 4, n) for n in range(2))
        return [d["id"] for table, _ in read_unit(Unit(0, pieces), ReadOptions()) for d in table.to_pylist()]

    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for n in range(2):
            put(tmp_path / folder / f"{n}.txt", b"text")
    first = ids(str(tmp_path / "one"))
    assert len(set(first)) == 2 and ids(str(tmp_path / "two")) == first
