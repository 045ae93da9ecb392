"""Pairs: template, mask, packing without loss, honest counts of what was cut, and errors with the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.errors import DataError
from modelyard.train.pairs import Encoded, PackedPairs, Pair, assign, encode, from_row, read_jsonl, split


@pytest.fixture(scope="module")
def tokenizer(tokens: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tokens / "tokenizer")


def pair(prompt: str, answer: str) -> Pair:
    return Pair(({"role": "user", "content": prompt},), answer, "here")


def test_the_mask_covers_the_answer_and_its_end(tokenizer: Any) -> None:
    (one,), counts = encode([pair("hello", "world")], tokenizer, 64)
    assert tokenizer.decode(one.ids[~one.learnt]) == "<|user|>hello<|assistant|>"
    assert tokenizer.decode(one.ids[one.learnt]) == "world<|endoftext|>"
    assert (counts.pairs, counts.truncated, counts.dropped, counts.completion_tokens) == (1, 0, 0, 6)


def test_cut_and_dropped_pairs_are_counted(tokenizer: Any) -> None:
    many = [pair("a", "b" * 5), pair("a", "b" * 100), pair("a" * 100, "b")]
    encoded, counts = encode(many, tokenizer, 16)
    assert (counts.pairs, counts.truncated, counts.dropped) == (3, 1, 1)
    assert [len(e.ids) for e in encoded] == [9, 16]
    with pytest.raises(DataError, match="none of 1 pairs has an answer token left"):
        encode(many[2:], tokenizer, 16)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: Any) -> None:
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        encode([pair("a", "b")], bare, 16)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 19)), min_size=1, max_size=80), st.integers(0, 5))
def test_packing_keeps_every_token_once(shapes: list[tuple[int, int]], seed: int) -> None:
    pairs, next_id = [], 1
    for length, start in shapes:
        ids = np.arange(next_id, next_id + length, dtype=np.int32)
        pairs.append(Encoded(ids, np.arange(length) >= min(start, length - 1)))
        next_id += length
    packed = PackedPairs.pack(pairs, 20, seed)
    rows = packed.batch(np.arange(len(packed)))
    held = rows["input_ids"][rows["document_ids"] >= 0]
    assert sorted(held) == list(range(1, next_id))
    learnt = {int(i) for i in rows["input_ids"][rows["loss_mask"]]}
    assert learnt == {int(i) for p in pairs for i in p.ids[p.learnt]}
    assert not rows["loss_mask"][rows["document_ids"] < 0].any()
    for ids, documents in zip(rows["input_ids"], rows["document_ids"], strict=True):
        for document in range(documents.max() + 1):
            inside = ids[documents == document]
            assert (np.diff(inside) == 1).all(), "a pair is whole and in order"


def test_first_fit_fills_gaps() -> None:
    assert assign([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]


def test_save_and_load(tmp_path: Path) -> None:
    packed = PackedPairs.pack([Encoded(np.arange(5, dtype=np.int32), np.arange(5) >= 2)], 8, 0, pad_id=4)
    packed.save(tmp_path / "x" / "train.npz")
    loaded = PackedPairs.load(tmp_path / "x" / "train.npz").batch([0])
    for name, array in packed.batch([0]).items():
        assert np.array_equal(array, loaded[name])
        assert array.dtype == loaded[name].dtype


def test_split_depends_on_content_alone() -> None:
    pairs = [pair(f"prompt {i}", f"answer {i}") for i in range(2000)]
    kept, held = split(pairs, 0.1)
    assert 120 < len(held) < 280
    again = split([*reversed(pairs), *pairs], 0.1)[1]
    assert {p.key for p in again} == {p.key for p in held}
    assert {p.key for p in kept}.isdisjoint(p.key for p in held)


def test_records_of_both_forms() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    found = from_row({"messages": [*messages, {"role": "assistant", "content": "a"}]}, "x:1")
    assert (found.messages, found.completion) == (tuple(messages), "a")
    assert from_row(found.dump(), "x:1") == found
    assert from_row({"prompt": "p", "text": "t"}, "x").dump() == {"prompt": "p", "completion": "t"}


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"question": "q"}', "fields question"),
        ('{"prompt": "p", "completion": "  "}', "empty answer"),
        ('{"messages": [{"role": "user", "content": "u"}]}', "ends with the assistant"),
        ('{"messages": "hello"}', "list of"),
    ],
)
def test_bad_records_are_named_with_their_line(line: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_jsonl(['{"prompt": "p", "completion": "c"}', "", line], "pairs.jsonl"))
    assert caught.value.place == "pairs.jsonl:3"
