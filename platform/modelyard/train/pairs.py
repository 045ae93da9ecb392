"""Supervised pairs: chat template, completion mask, packing of several pairs into one sequence.

A pair becomes `prompt tokens + completion tokens`, by the tokenizer's chat template; only the completion is learnt.
Pairs are packed whole into sequences in a shuffled order, and attention keeps them apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from modelyard.errors import DataError
from modelyard.tokens import permute

Message = dict[str, str]


@dataclass(frozen=True)
class Pair:
    """One example: the conversation up to the answer, and the answer. `place` says where it came from."""

    messages: tuple[Message, ...]
    completion: str
    place: str

    def dump(self) -> dict[str, Any]:
        """As one JSON-able record that :func:`from_row` reads."""
        if len(self.messages) == 1 and self.messages[0]["role"] == "user":
            return {"prompt": self.messages[0]["content"], "completion": self.completion}
        return {"messages": [*self.messages, {"role": "assistant", "content": self.completion}]}

    @property
    def key(self) -> int:
        """64-bit hash of what the pair says; decides on which side of the held-out split it falls."""
        text = json.dumps([*self.messages, self.completion], ensure_ascii=False, sort_keys=True)
        return int(xxhash.xxh3_64_intdigest(text.encode()))


def from_row(row: Mapping[str, Any], place: str) -> Pair:
    """A pair from one record: `prompt` and `completion` (or `text`), or `messages` that end with the assistant's.

    Raises:
        DataError: the record has neither form, or there is nothing to learn in it.
    """
    if "messages" in row:
        return _from_messages(row["messages"], place)
    prompt, completion = row.get("prompt"), row.get("completion", row.get("text"))
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise DataError(
            f"a record has the fields {', '.join(sorted(row))}",
            place=place,
            mend="write prompt and completion, or messages with role and content",
        )
    return _checked(Pair(({"role": "user", "content": prompt},), completion, place))


def _from_messages(messages: Any, place: str) -> Pair:
    whole = isinstance(messages, Sequence) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not whole or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError("messages must be a list of {role, content} that ends with the assistant's answer", place=place)
    turns = tuple({"role": m["role"], "content": m["content"]} for m in messages[:-1])
    return _checked(Pair(turns, messages[-1]["content"], place))


def _checked(pair: Pair) -> Pair:
    if not pair.completion.strip():
        raise DataError("a pair has an empty answer", place=pair.place, mend="drop the record")
    return pair


def read_jsonl(lines: Iterable[str], name: str) -> Iterator[Pair]:
    """Pairs from JSON lines; empty lines are passed over. Raises DataError with the line's number."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"not JSON: {error}", place=place) from error
        if not isinstance(row, dict):
            raise DataError("not a JSON object", place=place, mend="one object a line")
        yield from_row(row, place)


def split(pairs: Iterable[Pair], heldout: float) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs: by a hash of the content, so equal pairs fall on one side, on every machine."""
    kept: list[Pair] = []
    held: list[Pair] = []
    for pair in pairs:
        (held if pair.key / 2**64 < heldout else kept).append(pair)
    return kept, held


@dataclass(frozen=True)
class Encoded:
    """Token ids of one pair and where its completion starts."""

    ids: npt.NDArray[np.int32]
    start: int


@dataclass
class Counts:
    """What became of the pairs: how many, how many were cut to fit, and tokens learnt."""

    pairs: int = 0
    truncated: int = 0
    dropped: int = 0
    completion_tokens: int = 0


def encode(pairs: Iterable[Pair], tokenizer: Any, sequence_length: int) -> tuple[list[Encoded], Counts]:
    """Tokenizes pairs by the tokenizer's chat template and cuts those longer than a sequence at their end.

    A pair whose prompt alone fills the sequence is dropped, and counted. `tokenizer` is a transformers
    tokenizer with a chat template.

    Raises:
        DataError: the tokenizer has no chat template, or no pair has an answer token left.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the tokenizer has no chat template", mend="add chat_template to tokenizer_config.json")
    found: list[Encoded] = []
    counts = Counts()
    for pair in pairs:
        counts.pairs += 1
        prompt = _render(tokenizer, pair.messages, True)
        whole = _render(tokenizer, (*pair.messages, {"role": "assistant", "content": pair.completion}), False)
        ids, start = _tokens(tokenizer, prompt, whole)
        if start >= sequence_length:
            counts.dropped += 1
            continue
        counts.truncated += len(ids) > sequence_length
        found.append(Encoded(np.asarray(ids[:sequence_length], dtype=np.int32), start))
        counts.completion_tokens += len(found[-1].ids) - start
    if counts.pairs and not found:
        raise DataError(
            f"none of {counts.pairs:,} pairs has an answer token left within {sequence_length} tokens",
            mend="raise sequence_length or shorten the prompts",
        )
    return found, counts


def _render(tokenizer: Any, messages: tuple[Message, ...], generate: bool) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))


def _tokens(tokenizer: Any, prompt: str, whole: str) -> tuple[list[int], int]:
    # Encoded apart, so that no token straddles the border: at inference the prompt is encoded alone too.
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders a conversation differently with and without its answer",
            mend="use a template whose generation prompt is a prefix of the assistant's turn",
        )
    first = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return [*first, *tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]], len(first)


class PackedPairs:
    """Pairs packed into sequences of fixed length: the same interface as a token data set.

    Attributes:
        sequence_length: tokens a sequence.
        filled: share of positions that hold tokens rather than padding.
    """

    def __init__(self, ids: npt.NDArray[np.int32], documents: npt.NDArray[np.int32], learnt: npt.NDArray[np.bool_]):
        self._ids, self._documents, self._learnt = ids, documents, learnt
        self.sequence_length = ids.shape[1]
        self.filled = float((documents >= 0).mean())

    def __len__(self) -> int:
        return len(self._ids)

    def batch(self, indices: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        """`input_ids` int64, `document_ids` int32 (-1 at padding), `loss_mask` bool; each [n, L]."""
        rows = np.asarray(indices, dtype=np.int64)
        return {
            "input_ids": self._ids[rows].astype(np.int64),
            "document_ids": self._documents[rows],
            "loss_mask": self._learnt[rows],
        }

    @classmethod
    def pack(cls, pairs: Sequence[Encoded], sequence_length: int, seed: int, pad_id: int = 0) -> PackedPairs:
        """First fit over the last open sequences, in an order shuffled by `seed`."""
        order = permute(np.arange(len(pairs)), len(pairs), seed)
        rows = assign([len(pairs[i].ids) for i in order], sequence_length)
        shape = (len(rows), sequence_length)
        ids = np.full(shape, pad_id, dtype=np.int32)
        documents, learnt = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=bool)
        for row, members in enumerate(rows):
            at = 0
            for document, member in enumerate(members):
                pair = pairs[order[member]]
                end = at + len(pair.ids)
                ids[row, at:end], documents[row, at:end] = pair.ids, document
                learnt[row, at + pair.start : end] = True
                at = end
        return cls(ids, documents, learnt)

    def save(self, path: Path) -> None:
        """Writes the arrays for other processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as handle:
            np.savez(handle, ids=self._ids, documents=self._documents, learnt=self._learnt)

    @classmethod
    def load(cls, path: Path) -> PackedPairs:
        """Reads what :meth:`save` wrote; nothing pickled."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["ids"], arrays["documents"], arrays["learnt"])


_OPEN = 64
"""Sequences first fit looks at: more fills them little better and costs time."""


def assign(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which items (by position) share a sequence of `room` tokens: first fit among the last open ones."""
    rows: list[list[int]] = []
    left: list[int] = []
    for item, length in enumerate(lengths):
        lowest = max(0, len(rows) - _OPEN)
        row = next((r for r in range(lowest, len(rows)) if left[r] >= length), len(rows))
        if row == len(rows):
            rows.append([])
            left.append(room)
        rows[row].append(item)
        left[row] -= length
    return rows
