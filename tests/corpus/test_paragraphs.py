"""Repeated paragraphs: spans against a slow twin, what is cut and what stays."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus import dedup, paragraphs
from modelyard.corpus.arrow import buffers
from modelyard.corpus.dedup_options import ParagraphOptions

BLANK = " \t\r"
TEXT = st.text(alphabet="ab\u00e9 \t\r\n\n", max_size=60)


def slow(text: str, unit: str, least: int) -> list[str]:
    """Paragraphs or lines without blanks at their ends, from `least` bytes on."""
    lines = text.split("\n")
    blocks, current = [], []
    for line in [*lines, ""]:
        if line.strip(BLANK) and unit == "paragraph":
            current.append(line)
        elif unit == "paragraph":
            blocks, current = [*blocks, "\n".join(current)], []
        else:
            blocks.append(line)
    return [b for block in blocks if (b := block.strip(BLANK)) and len(b.encode()) >= least]


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, max_size=4), st.sampled_from(["paragraph", "line"]), st.integers(1, 5))
def test_spans_equal_the_slow_twin(texts: list[str], unit: str, least: int) -> None:
    from modelyard.corpus.kernels.paragraphs import spans

    data, offsets = buffers(pa.array(texts, pa.string()))
    rows, starts, ends = spans(data, offsets, unit == "line", least)
    found: list[list[str]] = [[] for _ in texts]
    for row, start, end in zip(rows, starts, ends, strict=True):
        found[row].append(texts[row].encode()[start:end].decode())
    assert found == [slow(text, unit, least) for text in texts]


def shortened(texts: list[str], options: ParagraphOptions) -> tuple[list[str], list[dict[str, Any]], list[bool]]:
    table = pa.table({"id": [f"id{n}" for n in range(len(texts))], "text": texts, "source": ["s"] * len(texts)})
    docs = dedup.address(3, len(texts))
    found = paragraphs.repeated(paragraphs.keys(table, docs, options))
    cut, edits, empty = paragraphs.apply(table, docs, found)
    return cut["text"].to_pylist(), edits.to_pylist(), empty.tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.sampled_from(["aaa", "bbb", "ccc ddd", "e"]), max_size=5), max_size=5))
def test_every_paragraph_stays_once(blocks: list[list[str]]) -> None:
    texts = ["\n\n".join(own) for own in blocks]
    cut, edits, empty = shortened(texts, ParagraphOptions(min_length=2)) if texts else ([], [], [])
    seen: set[str] = set()
    for own, text, gone in zip(blocks, cut, empty, strict=True):
        stay = [b for b in own if b == "e" or not (b in seen or seen.add(b))]  # type: ignore[func-returns-value]
        assert gone == (bool(own) and not stay)
        assert gone or text == "\n\n".join(stay)
    pieces = [b for own in blocks for b in own if b != "e"]
    assert len(edits) == len(pieces) - len(set(pieces))


def test_edits_are_audited_and_the_next_paragraph_keeps_its_indent() -> None:
    footer = "All rights reserved, and so on, by the owners of this page."
    texts = [f"One.\n\n{footer}\n\n    code()\n", f"Two.\r\n\r\n{footer}\r\n \n    code()\nmore", f"  {footer} "]
    cut, edits, empty = shortened(texts, ParagraphOptions(min_length=40))
    assert cut == [texts[0], "Two.\r\n\r\n    code()\nmore", texts[2]] and empty == [False, False, True]
    assert [(e["id"], e["twin"], e["reason"], e["bytes"], e["offset"], e["text"], e["detail"]) for e in edits] == [
        ("id1", "id0", "repeated_paragraph", len(footer), 8, footer, "edit"),
        ("id2", "id0", "repeated_paragraph", len(footer), 2, footer, "edit"),
    ]


@pytest.mark.parametrize("keep", ["first", "longest"])
def test_whose_copy_stays(keep: Any) -> None:
    texts = ["one footer", "one footer\n\nand a longer page"]
    cut, edits, _ = shortened(texts, ParagraphOptions(min_length=5, keep=keep))
    assert [e["id"] for e in edits] == ["id1" if keep == "first" else "id0"]
    assert re.sub("\\W+", " ", cut[1]) == ("and a longer page" if keep == "first" else "one footer and a longer page")


def test_nothing_repeated_changes_nothing() -> None:
    texts = ["a paragraph", "", "another\n\nthird one"]
    cut, edits, empty = shortened(texts, ParagraphOptions(min_length=1))
    assert cut == texts and not edits and not np.any(empty)
