"""The forms that instruction, preference and feedback data come in, read into four kinds of example.

| form | fields |
|---|---|
| messages | `messages`: a list of `{role, content}` that ends with the assistant |
| pairs | `prompt` and `completion` (or `text`, or a preference's `chosen`); the prompt a text or a list of messages |
| alpaca | `instruction`, `input` (may be empty), `output` |
| sharegpt | `conversations`: a list of `{from, value}` |
| hh | transcripts in one text: `\\n\\nHuman: ...\\n\\nAssistant: ...` (Bai et al. 2022, arXiv 2204.05862) |
| preferences | `chosen` and `rejected`, beside `prompt` or with it inside (lists of messages, transcripts); `margin` |
| feedback | `prompt`, `completion`, `label` (true = good): unpaired opinions, what serving collects |
| prompts | `prompt` or `messages`, and `answer` where a verifier needs one |

A record that is none of them is a DataError with its place. Light: no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from modelyard.errors import DataError
from modelyard.train.pairs import Message, Pair

Form = Literal["auto", "messages", "pairs", "alpaca", "sharegpt", "hh"]

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
             "system": "system", "tool": "tool"}  # fmt: skip
_ROLES = ("system", "user", "assistant", "tool")
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Preference:
    """Two continuations of one conversation, the first preferred. Each ends with the assistant's turn."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    place: str
    margin: float = 0.0

    @property
    def key(self) -> int:
        """64-bit hash of the prompt: all pairs of one prompt fall on one side of the held-out split."""
        return _key(self.prompt)

    def dump(self) -> dict[str, Any]:
        """As one JSON-able record that :func:`preference` reads."""
        return {"prompt": list(self.prompt), "chosen": list(self.chosen), "rejected": list(self.rejected),
                "margin": self.margin}  # fmt: skip


@dataclass(frozen=True)
class Feedback:
    """One answer and whether it was liked."""

    prompt: tuple[Message, ...]
    completion: str
    label: bool
    place: str

    @property
    def key(self) -> int:
        """64-bit hash of the prompt."""
        return _key(self.prompt)

    def dump(self) -> dict[str, Any]:
        """As one JSON-able record that :func:`feedback` reads."""
        return {"prompt": list(self.prompt), "completion": self.completion, "label": self.label}


@dataclass(frozen=True)
class Task:
    """A prompt to answer, and what verifiers need to judge: the whole record."""

    prompt: tuple[Message, ...]
    row: Mapping[str, Any] = field(hash=False)
    place: str

    @property
    def key(self) -> int:
        """64-bit hash of the prompt."""
        return _key(self.prompt)

    def dump(self) -> dict[str, Any]:
        """As one JSON-able record that :func:`task` reads."""
        return {**{k: v for k, v in self.row.items() if k != "messages"}, "prompt": list(self.prompt)}


def _key(messages: Sequence[Message]) -> int:
    return int(xxhash.xxh3_64_intdigest(json.dumps(list(messages), ensure_ascii=False, sort_keys=True).encode()))


def conversation(row: Mapping[str, Any], place: str, form: Form = "auto") -> Pair:
    """An example to imitate. Raises DataError for a record of another form, or with nothing to learn."""
    return _conversation(row, place, form)


def _conversation(row: Mapping[str, Any], place: str, form: Form) -> Pair:
    messages = _FORMS[_detect(row, place) if form == "auto" else form](row, place)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            "the conversation does not end with an answer of the assistant", place=place, mend="drop the record"
        )
    if not messages[-1]["content"].strip():
        raise DataError("a pair has an empty answer", place=place, mend="drop the record")
    return Pair(messages[:-1], messages[-1]["content"], place)


def preference(row: Mapping[str, Any], place: str) -> Preference:
    """A preference. Raises DataError for another form, an empty side, or two sides that say the same."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if chosen is None or rejected is None:
        raise _unknown(row, place, "chosen and rejected, with prompt or the whole conversation in both")
    if row.get("prompt"):
        prompt = _prompt(row["prompt"], place)
        sides = (_continuation(chosen, place), _continuation(rejected, place))
    else:
        whole = (_whole(chosen, place), _whole(rejected, place))
        shared = _common(*whole)
        prompt, sides = whole[0][:shared], (whole[0][shared:], whole[1][shared:])
    for name, side in zip(("chosen", "rejected"), sides, strict=True):
        if not side or side[-1]["role"] != "assistant" or not side[-1]["content"].strip():
            if sides[0] == sides[1]:
                break
            raise DataError(f"the {name} answer is empty", place=place, mend="drop the record")
    if [m["content"].strip() for m in sides[0]] == [m["content"].strip() for m in sides[1]]:
        raise DataError("chosen equals rejected: nothing is preferred", place=place, mend="drop the record")
    if not prompt:
        raise DataError("the preference has no prompt", place=place, mend="give prompt, or both conversations whole")
    return Preference(prompt, *sides, place, _margin(row, place))


def _margin(row: Mapping[str, Any], place: str) -> float:
    value = row.get("margin", 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"margin is {value!r}", place=place, mend="give a number, or leave it out")
    return float(value)


def feedback(row: Mapping[str, Any], place: str) -> list[Feedback]:
    """Opinions: one of an unpaired record, two of a preference. Raises DataError for another form."""
    if "label" in row and row.get("completion") is not None:
        label = row["label"]
        if not isinstance(label, bool) and label not in (0, 1):
            raise DataError(f"label is {label!r}", place=place, mend="write true (good) or false")
        pair = _conversation({"prompt": row.get("prompt"), "completion": row["completion"]}, place, "pairs")
        return [Feedback(pair.messages, pair.completion, bool(label), place)]
    if row.get("chosen") is None:
        raise _unknown(row, place, "prompt, completion and label, or preferences")
    both = preference(row, place)
    found = []
    for side, label in ((both.chosen, True), (both.rejected, False)):
        found.append(Feedback((*both.prompt, *side[:-1]), side[-1]["content"], label, place))
    return found


def task(row: Mapping[str, Any], place: str) -> Task:
    """A prompt to answer. Raises DataError when there is none."""
    given = row.get("prompt", row.get("messages", row.get("question")))
    if not given:
        raise _unknown(row, place, "prompt (a text or messages), and answer where a verifier needs one")
    prompt = _prompt(given, place)
    if prompt[-1]["role"] == "assistant":
        raise DataError("the prompt ends with the assistant's turn", place=place, mend="leave the answer out")
    return Task(prompt, dict(row), place)


def _detect(row: Mapping[str, Any], place: str) -> Form:
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row:
        return "alpaca"
    text = row.get("transcript", row.get("chosen"))
    if isinstance(text, str) and _TURN.match(text):
        return "hh"
    if "prompt" in row:
        return "pairs"
    raise _unknown(row, place, "prompt and completion, or messages with role and content")


def _unknown(row: Mapping[str, Any], place: str, mend: str) -> DataError:
    return DataError(f"a record has the fields {', '.join(sorted(row)) or 'none'}", place=place, mend=f"write {mend}")


def _messages(value: Any, place: str) -> tuple[Message, ...]:
    good = isinstance(value, Sequence) and all(
        isinstance(m, Mapping) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in value
    )
    if not good or isinstance(value, str):
        raise DataError(
            "messages must be a list of {role, content} that ends with the assistant's answer",
            place=place,
            mend=f"roles are {', '.join(_ROLES)}; content is a text",
        )
    return tuple({"role": m["role"], "content": m["content"]} for m in value)


def _prompt(value: Any, place: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not value.strip():
            raise DataError("the prompt is empty", place=place, mend="drop the record")
        return transcript(value, place) if _TURN.match(value) else ({"role": "user", "content": value},)
    return _messages(value, place)


def _continuation(value: Any, place: str) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": value},) if isinstance(value, str) else _messages(value, place)


def _whole(value: Any, place: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        if not _TURN.match(value):
            raise DataError(
                "chosen and rejected are texts without a prompt",
                place=place,
                mend="give prompt, or transcripts that begin with Human:",
            )
        return transcript(value, place)
    return _messages(value, place)


def _common(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Messages at the beginning that both share; never the last of either."""
    shared = 0
    for a, b in zip(one[:-1], other[:-1], strict=False):
        if a != b:
            break
        shared += 1
    # A prompt ends where the assistant's turn comes next.
    while shared and one[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def transcript(text: str, place: str) -> tuple[Message, ...]:
    """The turns of a `Human:` / `Assistant:` transcript. Raises DataError when it is none."""
    marks = list(_TURN.finditer(text))
    if not marks or text[: marks[0].start()].strip():
        raise DataError("not a transcript of Human: and Assistant: turns", place=place, mend="use another form")
    ends = [*(m.start() for m in marks[1:]), len(text)]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        {"role": roles[mark[1]], "content": text[mark.end() : end].strip()}
        for mark, end in zip(marks, ends, strict=True)
    )


def _from_messages(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    return _messages(row.get("messages"), place)


def _from_pairs(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    prompt, completion = row.get("prompt"), row.get("completion", row.get("text", row.get("chosen")))
    if not prompt or completion is None:
        raise _unknown(row, place, "prompt and completion, or messages with role and content")
    return (*_prompt(prompt, place), *_continuation(completion, place))


def _from_alpaca(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    instruction, context, output = row.get("instruction"), row.get("input") or "", row.get("output")
    if not isinstance(instruction, str) or not isinstance(output, str) or not isinstance(context, str):
        raise _unknown(row, place, "instruction, input and output, all texts")
    question = f"{instruction}\n\n{context}" if context.strip() else instruction
    return (*_prompt(question, place), {"role": "assistant", "content": output})


def _from_sharegpt(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    turns = row.get("conversations")
    good = isinstance(turns, Sequence) and all(
        isinstance(t, Mapping) and t.get("from") in _SHAREGPT and isinstance(t.get("value"), str) for t in turns
    )
    if not good or turns is None:
        raise DataError(
            "conversations must be a list of {from, value}", place=place, mend=f"from is one of {', '.join(_SHAREGPT)}"
        )
    return tuple({"role": _SHAREGPT[t["from"]], "content": t["value"]} for t in turns)


def _from_hh(row: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    text = row.get("transcript", row.get("chosen", row.get("text")))
    if not isinstance(text, str):
        raise _unknown(row, place, "transcript (or chosen) with Human: and Assistant: turns")
    return transcript(text, place)


_FORMS = {
    "messages": _from_messages,
    "pairs": _from_pairs,
    "alpaca": _from_alpaca,
    "sharegpt": _from_sharegpt,
    "hh": _from_hh,
}
