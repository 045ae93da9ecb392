"""Answers in steps, for process reward models: records with labels, where a step ends among token ids, what the scores
of several steps come to.

A step ends at the token that completes the separator behind it, the last one at the last token of the conversation.
Training finds the ends as scoring does, in ids alone, so that a model is asked where it has learnt to answer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from modelyard.align.encode import Group
from modelyard.align.records import Task, task
from modelyard.align.reward_options import StepsRule
from modelyard.errors import DataError
from modelyard.train.pairs import Counts, Encoded, Message, encode_chat


@dataclass(frozen=True)
class Stepped:
    """An answer in steps, each with the probability 0 to 1 that it is right, and its tokens with labels."""

    prompt: tuple[Message, ...]
    steps: tuple[str, ...]
    labels: tuple[float, ...]
    place: str
    document: Encoded = field(compare=False)

    @property
    def key(self) -> int:
        """64-bit hash of the prompt: all answers to one fall on one side of the held-out split."""
        return Task(self.prompt, {}, self.place).key

    def dump(self) -> dict[str, Any]:
        """As one JSON-able record that `StepReader` reads."""
        return {"prompt": list(self.prompt), "steps": list(self.steps), "labels": list(self.labels)}


class StepReader:
    """Makes answers in steps of records: `prompt` (or `messages`) with `steps` (or `completions`), which are texts
    beside a list `labels`, or objects with `text` and `label`.

    Args:
        tokenizer: transformers', with a chat template.
        separator: what stands between steps.
        length: tokens of a conversation at most.
    """

    def __init__(self, tokenizer: Any, separator: str, length: int) -> None:
        self._tokenizer, self._separator, self._length = tokenizer, separator, length
        self._ends = StepEnds(tokenizer.backend_tokenizer, separator)

    def __call__(self, row: Mapping[str, Any], place: str) -> Stepped:
        """Raises DataError for another form, labels that do not fit the steps, empty steps, steps that cannot be told
        apart, and where none ends within the length."""
        prompt = task(row, place).prompt
        steps, labels = _steps(row, place)
        steps = [step.removesuffix(self._separator) for step in steps]
        for number, step in enumerate(steps, 1):
            if not step.strip():
                raise DataError(f"step {number} is empty", place=place, mend="drop the step with its label")
        answer = {"role": "assistant", "content": self._separator.join(steps)}
        document = encode_chat(self._tokenizer, (*prompt, answer))
        ends = self._ends(document.ids.tolist(), int(document.learnt.argmax()))
        if len(ends) != len(steps):
            raise DataError(
                f"there are {len(steps)} steps, and cut at {self._separator!r} the answer has {len(ends)}",
                place=place,
                mend="choose a separator that no step holds (reward.process.separator)",
            )
        if ends[0] >= self._length:
            raise DataError(f"no step ends within {self._length} tokens", place=place, mend="raise sequence_length")
        marks = np.full(len(document.ids), -1, dtype=np.float32)
        marks[ends] = labels
        return Stepped(prompt, tuple(steps), tuple(labels), place, replace(document, labels=marks))


def _steps(row: Mapping[str, Any], place: str) -> tuple[list[str], list[float]]:
    """Texts and labels of a record's steps. Raises DataError."""
    steps, labels = row.get("steps", row.get("completions")), row.get("labels")
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise DataError(f"a record has the fields {', '.join(sorted(row))}", place=place,
                        mend="write prompt, steps and labels, or steps with text and label")  # fmt: skip
    if not steps:
        raise DataError("there are no steps", place=place, mend="drop the record")
    if all(isinstance(step, Mapping) for step in steps):
        steps, labels = [step.get("text") for step in steps], [step.get("label") for step in steps]
    if not all(isinstance(step, str) for step in steps):
        raise DataError("a step is no text", place=place, mend="write texts beside labels, or objects {text, label}")
    if not isinstance(labels, Sequence) or isinstance(labels, str) or len(labels) != len(steps):
        count = len(labels) if isinstance(labels, Sequence) and not isinstance(labels, str) else "no"
        raise DataError(f"{len(steps)} steps have {count} labels", place=place, mend="give one label a step")
    for number, label in enumerate(labels, 1):
        if not isinstance(label, bool | int | float) or not 0 <= label <= 1:
            raise DataError(f"the label of step {number} is {label!r}", place=place,
                            mend="give true, false or a number from 0 to 1")  # fmt: skip
    return list(steps), [float(label) for label in labels]


def cut_steps(
    examples: Sequence[Stepped], tokenizer: Any, length: int, whole_only: bool = False
) -> tuple[list[Group], list[int], Counts]:
    """Each answer as a group of its own, cut to `length` tokens: steps that end behind it are left out. With
    `whole_only` an answer that is longer is dropped; both are counted. Results as those of `encode_preferences`.

    Raises:
        DataError: none is left.
    """
    kept = [i for i, e in enumerate(examples) if not (whole_only and len(e.document.ids) > length)]
    if not kept:
        raise DataError(f"none of {len(examples):,} answers fits into {length} tokens", place="sequence_length",
                        mend="raise sequence_length, or use long: cut")  # fmt: skip
    groups: list[Group] = [(examples[i].document.cut(length),) for i in kept]
    truncated = sum(len(examples[i].document.ids) > length for i in kept)
    tokens = sum(int(group[0].learnt.sum()) for group in groups)
    return groups, kept, Counts(len(examples), truncated, len(examples) - len(kept), tokens)


class StepEnds:
    """Finds where steps end among token ids; nothing is tokenized again.

    Args:
        tokenizer: that of the ids.
        separator: what stands between steps.
    """

    def __init__(self, tokenizer: Tokenizer, separator: str) -> None:
        self._tokenizer, self._separator = tokenizer, separator

    def __call__(self, ids: Sequence[int], start: int) -> list[int]:
        """Places among `ids` at which the steps of the answer that begins at `start` end, one at least.

        What is only whitespace is no step. An answer that ends without a separator ends its last step with its last
        token, also where that is the template's.
        """
        stream = DecodeStream(skip_special_tokens=True)
        ends: list[int] = []
        text = ""
        for place in range(start, len(ids)):
            piece = stream.step(self._tokenizer, int(ids[place])) or ""
            text += piece
            if self._separator[-1] in piece:
                *done, text = text.split(self._separator)
                if any(step.strip() for step in done):
                    ends.append(place)
        if text.strip() or not ends:
            ends.append(len(ids) - 1)
        return ends


def of_steps(scores: Sequence[float], rule: StepsRule) -> float:
    """One number of the scores of an answer's steps: `min` (Wang et al. 2023, arXiv 2312.08935), `product` of
    probabilities (Lightman et al. 2023, 2305.20050), `mean`, or the `last`."""
    if rule == "product":
        return math.prod(scores)
    if rule == "mean":
        return math.fsum(scores) / len(scores)
    return min(scores) if rule == "min" else scores[-1]


def scored_steps(
    rows: Mapping[str, npt.NDArray[Any]], probabilities: npt.NDArray[Any]
) -> list[npt.NDArray[np.float64]]:
    """Of packed rows every answer as [steps, 3]: the probability read at its end, its label, and its tokens.

    `rows` are a batch of `PackedPairs` with `step_labels`; `probabilities` [B, L].
    """
    found = []
    for row, documents in enumerate(rows["document_ids"]):
        mask, labels = rows["loss_mask"][row], rows["step_labels"][row]
        for document in range(int(documents.max(initial=-1)) + 1):
            inside = (documents == document) & mask
            ends = np.flatnonzero(inside & (labels >= 0))
            if len(ends):
                tokens = np.diff(np.cumsum(inside)[ends], prepend=0)
                found.append(np.stack([probabilities[row, ends], labels[ends], tokens], axis=1).astype(np.float64))
    return found
