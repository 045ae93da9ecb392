"""Every form of record: what is learnt of it, and what is wrong with a bad one, by its place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from modelyard.align.encode import encode_preferences, use_template
from modelyard.align.records import conversation, feedback, preference, task
from modelyard.errors import DataError
from modelyard.train.pairs import Pair, encode, encode_chat

USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
HH = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: and?\n\nAssistant: "


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"messages": [USER, ANSWER]}, ["u"], "a"),
        ({"prompt": "u", "completion": "a"}, ["u"], "a"),
        ({"prompt": [USER], "completion": [ANSWER]}, ["u"], "a"),
        ({"prompt": "u", "text": "a", "id": "7", "source": "s"}, ["u"], "a"),
        ({"instruction": "add", "input": "1 and 2", "output": "3"}, ["add\n\n1 and 2"], "3"),
        ({"instruction": "say hi", "input": "", "output": "hi"}, ["say hi"], "hi"),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ["u"], "a"),
        ({"chosen": HH + "well", "rejected": HH + "no"}, ["hello", "hi", "and?"], "well"),
        ({"transcript": HH + "well"}, ["hello", "hi", "and?"], "well"),
    ],
)
def test_instruction_forms(row: dict[str, Any], prompt: list[str], answer: str) -> None:
    found = conversation(row, "x:1")
    assert [m["content"] for m in found.messages] == prompt
    assert found.completion == answer


def test_preference_forms_find_the_prompt() -> None:
    with_prompt = preference({"prompt": "u", "chosen": "yes", "rejected": "no", "margin": 1}, "x")
    assert (with_prompt.prompt, with_prompt.margin) == ((USER,), 1.0)
    inside = preference({"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "b"}]}, "x")
    assert inside.prompt == (USER,)
    spoken = preference({"chosen": HH + "well", "rejected": HH + "no"}, "x")
    assert [m["content"] for m in spoken.prompt] == ["hello", "hi", "and?"]
    assert preference(spoken.dump(), "x") == spoken
    opinions = feedback(spoken.dump(), "x")
    assert [(o.completion, o.label) for o in opinions] == [("well", True), ("no", False)]
    logged = {"prompt": [USER], "completion": "a", "label": False, "rating": "down", "comment": None}
    assert [(o.completion, o.label) for o in feedback(logged, "x")] == [("a", False)]
    assert task({"question": "1+1?", "answer": 2}, "x").row["answer"] == 2


@pytest.mark.parametrize(
    ("read", "row", "complaint"),
    [
        (conversation, {"q": "x"}, "has the fields q"),
        (conversation, {"messages": [USER]}, "does not end with an answer"),
        (conversation, {"messages": [{"role": "robot", "content": "x"}, ANSWER]}, "list of {role, content}"),
        (conversation, {"conversations": [{"from": "alien", "value": "x"}]}, "list of {from, value}"),
        (conversation, {"instruction": "x", "output": 3}, "has the fields"),
        (conversation, {"prompt": "u", "completion": " "}, "empty answer"),
        (conversation, {"prompt": " ", "completion": "a"}, "prompt is empty"),
        (preference, {"prompt": "u", "chosen": "a"}, "has the fields chosen, prompt"),
        (preference, {"prompt": "u", "chosen": "a", "rejected": "a "}, "chosen equals rejected"),
        (preference, {"prompt": "u", "chosen": "", "rejected": "b"}, "chosen answer is empty"),
        (preference, {"prompt": "u", "chosen": "a", "rejected": " "}, "rejected answer is empty"),
        (preference, {"chosen": "a", "rejected": "b"}, "without a prompt"),
        (preference, {"prompt": "u", "chosen": "a", "rejected": "b", "margin": "much"}, "margin is 'much'"),
        (feedback, {"prompt": "u", "completion": "a", "label": "good"}, "label is 'good'"),
        (feedback, {"prompt": "u", "completion": "a"}, "has the fields"),
        (task, {"answer": 4}, "has the fields answer"),
        (task, {"messages": [USER, ANSWER]}, "ends with the assistant"),
    ],
)
def test_bad_records_say_what_and_where(read: Any, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        read(row, "file:7")
    assert caught.value.place == "file:7"


def test_turnwise_masks(words: Any) -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "v"}, {"role": "assistant", "content": "bb"}]
    last, every = encode_chat(words, turns), encode_chat(words, turns, "turns")
    assert np.array_equal(last.ids, every.ids)
    assert words.decode(last.ids[last.learnt]) == "bb<|endoftext|>"
    assert words.decode(every.ids[every.learnt]) == "a<|endoftext|>bb<|endoftext|>"
    assert encode_chat(words, turns, "all").learnt.all()


@pytest.mark.parametrize("name", ["chatml", "zephyr", "plain"])
def test_templates_by_name_open_the_answer(words: Any, name: Any) -> None:
    import copy

    chosen = use_template(copy.deepcopy(words), name)
    found = encode_chat(chosen, [USER, ANSWER])
    assert chosen.decode(found.ids[found.learnt]).startswith("a")
    bare = copy.deepcopy(words)
    bare.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        use_template(bare, "own")


def test_sides_cut_to_the_same_tokens_are_dropped_and_counted(words: Any) -> None:
    examples = [preference({"prompt": "u", "chosen": "x" * 90 + "a", "rejected": "x" * 90 + "b"}, "x"),
                preference({"prompt": "u", "chosen": "x" * 90, "rejected": "b"}, "y")]  # fmt: skip
    groups, kept, counts = encode_preferences(examples, words, 32)
    assert (kept, counts.dropped, counts.truncated) == ([1], 1, 1)
    assert len(groups[0][0].ids) == 32


def test_long_examples_are_cut_or_left_out(words: Any) -> None:
    short, long = preference(_pair("b", "c"), "x:1"), preference(_pair("b" * 30, "c"), "x:2")
    cut, _, counts = encode_preferences([short, long], words, 16)
    assert (len(cut), counts.truncated, counts.dropped) == (2, 1, 0)
    whole, kept, counts = encode_preferences([short, long], words, 16, whole_only=True)
    assert (len(whole), kept, counts.truncated, counts.dropped) == (1, [0], 0, 1)
    pairs = [Pair(({"role": "user", "content": "a"},), text, "x") for text in ("b", "b" * 30)]
    assert [len(encode(pairs, words, 16, "last", only)[0]) for only in (False, True)] == [2, 1]


def _pair(chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": "a", "chosen": chosen, "rejected": rejected}
