"""Normalization: the byte kernel against regular expressions, Unicode forms, mojibake, and untouched clean text."""

from __future__ import annotations

import unicodedata
from typing import Any

import pyarrow as pa
import pytest
from corpus_twins import clean
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus.options import NormalizeOptions
from modelyard.corpus.step import split
from modelyard.corpus.steps.normalize import Normalize

ALPHABET = "ab \t\n\r\x00\x07\x0b\x0c\x7f\x85\u00a0\u00e9\u2003\u200b\u200d\u2028\u3000\ufeff\u4e2d\U0001f600"


def normalize(texts: list[str], **options: Any) -> list[str]:
    table = pa.table({"id": [str(n) for n in range(len(texts))], "text": pa.array(texts, pa.string())})
    return Normalize(NormalizeOptions(**options))(table)["text"].to_pylist()


@settings(max_examples=400, deadline=None)
@given(st.lists(st.text(alphabet=ALPHABET, max_size=40), min_size=1, max_size=4), st.sampled_from([None, 0, 1, 2]))
def test_whitespace_and_control_equal_the_slow_twin(texts: list[str], most: int | None) -> None:
    ours = normalize(texts, unicode=None, mojibake=False, max_blank_lines=most)
    assert ours == [clean(text, most) for text in texts]


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=ALPHABET + "e\u0301\u00c5\u212b", max_size=40))
def test_normalizing_twice_changes_nothing(text: str) -> None:
    for mode in ("lines", "collapse", None):
        once = normalize([text], whitespace=mode, mojibake=False)
        assert normalize(once, whitespace=mode, mojibake=False) == once
        assert unicodedata.is_normalized("NFC", once[0])


def test_collapse_joins_blanks_and_lines_keeps_indentation() -> None:
    text = "def f():\n    return  1\t\t+ 2   \n"
    assert normalize([text]) == ["def f():\n    return  1\t\t+ 2"]
    assert normalize([text], whitespace="collapse") == ["def f():\nreturn 1 + 2"]


def test_unicode_forms() -> None:
    assert normalize(["cafe\u0301 \ufb01n"]) == ["caf\u00e9 \ufb01n"]
    assert normalize(["cafe\u0301 \ufb01n"], unicode="NFKC") == ["caf\u00e9 fin"]
    assert normalize(["cafe\u0301"], unicode=None) == ["cafe\u0301"]


@pytest.mark.parametrize("text", ["Ça coûte 5 € à l’hôtel", "naïve café", "Größe übt", "日本語のテキスト"])
@pytest.mark.parametrize("codec", ["latin-1", "cp1252"])
def test_mojibake_is_repaired_and_good_text_left_alone(text: str, codec: str) -> None:
    assert normalize([text]) == [text]
    try:
        broken = text.encode().decode(codec)
    except UnicodeDecodeError:
        pytest.skip("these bytes have no characters in this codec")
    assert normalize([broken]) == [text]
    assert normalize([broken], mojibake=False) != [text]


def test_only_the_documents_in_need_are_touched(documents: Any) -> None:
    step = Normalize(NormalizeOptions())
    clean_text = "plain text\nin two lines"
    kept, removed = split(step(documents(clean_text, "trailing \n", " \n\t", "\u200b")))
    assert kept["text"].to_pylist() == [clean_text, "trailing"]
    assert removed["reason"].to_pylist() == ["empty", "empty"]
    assert step.counts["whitespace"] == 3


def test_prompts_are_normalized_too(documents: Any) -> None:
    table = Normalize(NormalizeOptions())(documents("x", prompt=["def f(): \r\n"]))
    assert table["prompt"].to_pylist() == ["def f():"]
