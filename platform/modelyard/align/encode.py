"""From examples to token sequences: templates by name, the two answers of a preference, KTO's mismatched answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import TemplateError

from modelyard.align.options import TemplateName
from modelyard.align.records import Feedback, Preference
from modelyard.errors import DataError
from modelyard.train.pairs import Counts, Encoded, Message, encode_chat, render

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}A: {{ message['content'] }}{{ eos_token }}\n"
    "{% else %}Q: {{ message['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
TEMPLATES = {"chatml": _CHATML, "zephyr": _ZEPHYR, "plain": _PLAIN}

Group = tuple[Encoded, ...]


def use_template(tokenizer: Any, name: TemplateName) -> Any:
    """The tokenizer with the chat template `name`; `own` leaves it.

    Raises:
        DataError: `own`, and the tokenizer has none.
    """
    if name != "own":
        tokenizer.chat_template = TEMPLATES[name]
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            place="template",
            mend=f"choose one by name: template: {', '.join(TEMPLATES)}",
        )
    return tokenizer


def after_answer(tokenizer: Any) -> tuple[int, ...]:
    """Token ids that the chat template puts behind the token that ends an answer (a line feed, say)."""
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    ids = encode_chat(tokenizer, turns).ids.tolist()
    ends = [place for place, token in enumerate(ids) if token == tokenizer.eos_token_id]
    return tuple(ids[ends[-1] + 1 :]) if ends else ()


def around_observation(tokenizer: Any, role: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that the chat template puts between an answer's text and an observation in a turn of `role`, and behind
    the observation up to the next answer's text.

    Raises:
        DataError: the template does not take such a conversation.
    """
    answer, observation = "answerhere", "observationhere"
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": answer})
    try:
        text = render(tokenizer, (*turns, {"role": role, "content": observation}), generate=True)
    except TemplateError:
        text = ""
    if text.count(answer) != 1 or text.count(observation) != 1:
        raise DataError(f"the chat template has no place for a turn of {role!r}", place="rollouts.environment.role",
                        mend="use another role (user), or form: plain")  # fmt: skip
    before, after = text.split(answer)[1].split(observation)
    first, second = (tuple(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in (before, after))
    return first, second


def encode_preferences(
    examples: Sequence[Preference], tokenizer: Any, length: int, whole_only: bool = False
) -> tuple[list[Group], list[int], Counts]:
    """(chosen, rejected) of each preference, each at most `length` tokens; the index of the example each came from.

    Learnt are the assistant's turns after the prompt. A preference one side of which has no such token left after
    cutting, or whose sides are cut to the same tokens, is dropped and counted; with `whole_only` one that is longer.

    Raises:
        DataError: none is left, or the template does not fit.
    """
    groups: list[Group] = []
    kept: list[int] = []
    counts = Counts()
    for index, example in enumerate(examples):
        counts.pairs += 1
        sides = [
            encode_chat(tokenizer, (*example.prompt, *side), "turns", len(example.prompt))
            for side in (example.chosen, example.rejected)
        ]
        cut = tuple(side.cut(length) for side in sides)
        if not _usable(sides, cut, whole_only) or np.array_equal(cut[0].ids, cut[1].ids):
            counts.dropped += 1
            continue
        _count(counts, sides, cut, length)
        groups.append(cut)
        kept.append(index)
    return _some(groups, counts, length), kept, counts


def encode_feedback(
    examples: Sequence[Feedback], tokenizer: Any, length: int, whole_only: bool = False
) -> tuple[list[Group], list[int], Counts]:
    """(answer, another example's answer to the same prompt) of each opinion; the second estimates KTO's baseline.

    Cut and dropped as by :func:`encode_preferences`.

    Raises:
        DataError: none is left, or the template does not fit.
    """
    groups: list[Group] = []
    kept: list[int] = []
    counts = Counts()
    for index, example in enumerate(examples):
        counts.pairs += 1
        other = examples[(index + 1) % len(examples)].completion
        sides = [encode_chat(tokenizer, _answered(example.prompt, text)) for text in (example.completion, other)]
        cut = tuple(side.cut(length) for side in sides)
        if not _usable(sides, cut, whole_only):
            counts.dropped += 1
            continue
        _count(counts, sides, cut, length)
        groups.append(cut)
        kept.append(index)
    return _some(groups, counts, length), kept, counts


def _answered(prompt: Sequence[Message], text: str) -> tuple[Message, ...]:
    return (*prompt, {"role": "assistant", "content": text})


def _usable(whole: Sequence[Encoded], cut: Sequence[Encoded], whole_only: bool) -> bool:
    if whole_only and any(len(side.ids) > len(short.ids) for side, short in zip(whole, cut, strict=True)):
        return False
    return all(side.learnt.any() for side in cut)


def _count(counts: Counts, whole: Sequence[Encoded], cut: Sequence[Encoded], length: int) -> None:
    counts.truncated += any(len(side.ids) > length for side in whole)
    counts.completion_tokens += sum(int(side.learnt.sum()) for side in cut)


def _some(groups: list[Group], counts: Counts, length: int) -> list[Group]:
    if not groups:
        raise DataError(
            f"none of {counts.pairs:,} examples has an answer token left within {length} tokens",
            place="sequence_length",
            mend="raise sequence_length or shorten the prompts",
        )
    return groups
