"""Quality rules: the kernel against a slow twin, every rule on a text made to break it, and C4's line cutting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpus_twins import c4_verdict, lines_of, statistics
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus.kernels.text import SYMBOL, classes
from modelyard.corpus.options import QualityOptions
from modelyard.corpus.step import split
from modelyard.corpus.steps.quality import Quality

TEXT = st.text(alphabet="ab\u00e9\u4e2d. .\u2026#-\u2022\n\n\r\t{1!?\"'\u3002\U0001f600\U00020000 ", max_size=120)
PHRASES = st.lists(
    st.sampled_from(
        ["the", "be", "to", "and", "Lorem ipsum dolor sit.", "uses Cookies now.", "javascript is on.", "a { b c.",
         "one two three four five six.", "one two three four five six.", "\n", "\n\n", "x" * 1001, "...", "#", "- "]
    ),
    max_size=40,
).map(" ".join)  # fmt: skip


def symbol(char: str) -> bool:
    return ord(char) < 0x20000 and bool(classes()[ord(char)] & SYMBOL)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(TEXT, PHRASES), min_size=1, max_size=4))
def test_statistics_equal_the_slow_twin(texts: list[str]) -> None:
    got = Quality(QualityOptions()).statistics(pa.array(texts))
    for row, text in enumerate(texts):
        expected = statistics(text, symbol)
        assert {name: int(got[name][row]) for name in expected} == expected, repr(text)


def test_statistics_equal_the_twin_on_real_documents(prose: list[str]) -> None:
    texts = prose[:60]
    got = Quality(QualityOptions()).statistics(pa.array(texts))
    for row, text in enumerate(texts):
        expected = statistics(text, symbol)
        assert {name: int(got[name][row]) for name in expected} == expected


GOOD = (
    "The committee had to decide with care, and that is what the members have done in the end. "
    "It was not an easy matter to be settled, because each of them held a different opinion about the "
    "value of the plan that lay before them. Some spoke of money; others spoke of time. "
    "After three hours the chair asked for a vote, and twelve hands went up.\n"
    "Nobody was surprised by the result, although many had hoped for another one. "
    "Work began the following week, under a grey sky and in good spirits.\n"
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("too short to say anything", "gopher_short_doc"),
        (GOOD + " # # # # # # # # # # # # # # # # #", "gopher_hashes"),
        ("".join(f"* {w} the of and\n" for w in range(1234567, 1234627)), "gopher_alphabetic_words"),
        ("".join(f"- the {chr(97 + i % 26) * (i % 7 + 4)} of and\n" for i in range(60)), "gopher_bullet_lines"),
        ("\n".join(f"{w} therefore continuing ..." for w in GOOD.split()[:60]), "gopher_ellipses"),
        (GOOD.replace("the ", "xy ").replace("The ", "Xy ").replace(" to ", " xy ").replace(" be ", " xy ")
         .replace(" of ", " xy ").replace(" and ", " xy ").replace(" that ", " xy ").replace(" have ", " xy ")
         .replace("with ", "xy "), "gopher_stop_words"),
        ("\n".join(["The same line of text is here again and again with words."] * 20), "gopher_dup_lines"),
        (GOOD + "\n{ return 1 } is the code that we have to see.", "c4_curly_bracket"),
        (GOOD + "\nLorem ipsum is the text that we have here.", "c4_lorem_ipsum"),
        (GOOD.replace(". ", ", ").replace(".\n", ",\n"), "c4_few_sentences"),
    ],
)  # fmt: skip
def test_each_rule_names_itself(documents: Any, text: str, reason: str) -> None:
    _, removed = split(Quality(QualityOptions())(documents(text)))
    assert removed["reason"].to_pylist() == [reason]


def test_good_prose_passes_and_null_turns_a_rule_off(documents: Any) -> None:
    kept, _ = split(Quality(QualityOptions())(documents(GOOD, "too short")))
    assert kept.num_rows == 1
    for least, number in ((500, 0), (None, 1)):
        options = QualityOptions.model_validate({"rules": ["gopher"], "gopher": {"min_words": least}})
        kept, _ = split(Quality(options)(documents(GOOD)))
        assert kept.num_rows == number


def test_annotate_drops_nothing_and_tags(documents: Any) -> None:
    options = QualityOptions(mode="annotate", statistics=True)
    table = Quality(options)(documents(GOOD, "too short"))
    kept, removed = split(table)
    assert kept.num_rows == 2 and not removed.num_rows
    assert kept["quality_reason"].to_pylist() == [None, "gopher_short_doc"]
    assert kept["text"].to_pylist() == [GOOD, "too short"]
    assert kept["stat_words"].to_pylist()[1] == 2
    scores = kept["quality"].to_numpy()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_c4_cuts_the_lines_it_does_not_keep(documents: Any) -> None:
    text = GOOD + "Home | About | Contact\nThis site uses cookies and you have to live with that.\n"
    options = QualityOptions.model_validate({"rules": ["c4"], "c4": {"min_sentences": 3}})
    step = Quality(options)
    kept, _ = split(step(documents(text, GOOD)))
    assert kept["text"].to_pylist() == [GOOD.strip(), GOOD]
    assert step.counts["lines_removed"] == 2
    untouched = options.model_copy(update={"c4": options.c4.model_copy(update={"remove_lines": False})})
    kept, _ = split(Quality(untouched)(documents(text)))
    assert kept["text"].to_pylist() == [text]


@settings(max_examples=150, deadline=None)
@given(PHRASES)
def test_cut_lines_equal_the_slow_twin(text: str) -> None:
    from modelyard.corpus.arrow import buffers, strings
    from modelyard.corpus.kernels.lines import kept_lines

    step = Quality(QualityOptions())
    out = strings(*kept_lines(*buffers(pa.array([text])), np.array([0]), classes(), step._rules)).to_pylist()
    stripped = [line.strip() for line in lines_of(text)]
    assert out == ["\n".join(line for line in stripped if c4_verdict(line) == "keep")]


def test_rules_judge_in_the_order_given(documents: Any) -> None:
    text = "a { b."
    for rules, first in ((["gopher", "c4"], "gopher_short_doc"), (["c4", "gopher"], "c4_curly_bracket")):
        step = Quality(QualityOptions.model_validate({"rules": rules}))
        _, removed = split(step(documents(text + " one two three.")))
        assert removed["reason"].to_pylist() == [first]


def test_an_empty_batch_and_an_empty_text_work(documents: Any) -> None:
    assert Quality(QualityOptions())(documents()).num_rows == 0
    _, removed = split(Quality(QualityOptions(rules=("fineweb",)))(documents("")))
    assert removed["reason"].to_pylist() == ["fineweb_empty"]
