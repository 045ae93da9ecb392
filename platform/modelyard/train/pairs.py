"""Supervised pairs: chat template, completion mask, packing of several pairs into one sequence.

A pair becomes `prompt tokens + completion tokens`, by the tokenizer's chat template; only the completion is learnt,
or every answer of the assistant. Documents are packed whole into sequences in a shuffled order, and attention keeps
them apart; those of a group (chosen and rejected answer) share a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
    """Token ids of one document, and which of them are learnt; both [n]. Where steps are scored, also the label of the
    step that ends at a token, -1 where none does; float32 [n]."""

    ids: npt.NDArray[np.int32]
    learnt: npt.NDArray[np.bool_]
    labels: npt.NDArray[np.float32] | None = None

    def cut(self, length: int) -> Encoded:
        """The first `length` tokens."""
        labels = None if self.labels is None else self.labels[:length]
        return Encoded(self.ids[:length], self.learnt[:length], labels)


@dataclass
class Counts:
    """What became of the pairs: how many, how many were cut to fit, and tokens learnt."""

    pairs: int = 0
    truncated: int = 0
    dropped: int = 0
    completion_tokens: int = 0


Learn = Literal["last", "turns", "all"]
"""Which tokens of a conversation are learnt: the last answer, every answer of the assistant, or everything."""


def encode(
    pairs: Iterable[Pair], tokenizer: Any, sequence_length: int, learn: Learn = "last", whole_only: bool = False
) -> tuple[list[Encoded], Counts]:
    """Tokenizes pairs by the tokenizer's chat template and cuts those longer than a sequence at their end, or drops
    them (`whole_only`).

    A pair of which no token to be learnt is left is dropped; both are counted. `tokenizer` is a transformers
    tokenizer with a chat template.

    Raises:
        DataError: the tokenizer has no chat template, or no pair has an answer token left.
    """
    found: list[Encoded] = []
    counts = Counts()
    for pair in pairs:
        counts.pairs += 1
        whole = encode_chat(tokenizer, (*pair.messages, {"role": "assistant", "content": pair.completion}), learn)
        fitting = whole.cut(sequence_length)
        if not fitting.learnt.any() or (whole_only and len(whole.ids) > sequence_length):
            counts.dropped += 1
            continue
        counts.truncated += len(whole.ids) > sequence_length
        counts.completion_tokens += int(fitting.learnt.sum())
        found.append(fitting)
    if counts.pairs and not found:
        raise DataError(
            f"none of {counts.pairs:,} pairs has an answer token left within {sequence_length} tokens",
            mend="raise sequence_length or shorten the prompts",
        )
    return found, counts


def encode_chat(tokenizer: Any, messages: Sequence[Message], learn: Learn = "last", since: int = 1) -> Encoded:
    """One conversation by the chat template, with the tokens of the answers to be learnt marked: with `turns` those
    from message number `since` on.

    What lies between two borders is tokenized apart, so that no token straddles one: at inference a prompt is
    tokenized alone too. An answer's end-of-turn token belongs to it.

    Raises:
        DataError: the tokenizer has no chat template, or the template writes a beginning of the conversation
            differently once it goes on.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template",
            place="template",
            mend="choose one by name (template: chatml), or add chat_template to tokenizer_config.json",
        )
    whole = render(tokenizer, messages, generate=False)
    ids: list[int] = []
    learnt: list[bool] = []

    def add(text: str, wanted: bool) -> None:
        fresh = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids.extend(fresh)
        learnt.extend([wanted] * len(fresh))

    at = 0
    for begin, end in _answers(tokenizer, messages, whole, learn, since):
        add(whole[at:begin], False)
        add(whole[begin:end], True)
        at = end
    add(whole[at:], False)
    return Encoded(np.asarray(ids, dtype=np.int32), np.asarray(learnt, dtype=bool))


def _answers(
    tokenizer: Any, messages: Sequence[Message], whole: str, learn: Learn, since: int
) -> list[tuple[int, int]]:
    """Where the answers to be learnt begin and end in the rendered text."""
    if learn == "all":
        return [(0, len(whole))]
    last = len(messages) - 1
    turns = (
        [i for i in range(max(1, since), last + 1) if messages[i]["role"] == "assistant"]
        if learn == "turns"
        else [last]
    )
    found = []
    for turn in turns:
        before = render(tokenizer, messages[:turn], generate=True)
        through = whole if turn == last else render(tokenizer, messages[: turn + 1], generate=False)
        if not (whole.startswith(before) and whole.startswith(through)):
            raise DataError(
                "the chat template renders a conversation differently with and without its answer",
                place="template",
                mend="use learn: last, or a template whose generation prompt is a prefix of the assistant's turn",
            )
        found.append((len(before), len(through)))
    return found


def render(tokenizer: Any, messages: Sequence[Message], *, generate: bool) -> str:
    """The conversation as the template writes it; `generate` opens the assistant's turn."""
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=generate))


Values = Mapping[str, npt.NDArray[Any]]


class PackedPairs:
    """Documents packed into sequences of fixed length: the same interface as a token data set.

    Attributes:
        sequence_length: tokens a sequence.
        filled: share of positions that hold tokens rather than padding.
    """

    def __init__(self, tokens: Values, values: Values | None = None) -> None:
        """`tokens` arrays are [n, L], `values` [n, D]: one entry for each document of a sequence."""
        self._tokens, self._values = dict(tokens), dict(values or {})
        documents = self._tokens["document_ids"]
        self.sequence_length = documents.shape[1]
        self.filled = float((documents >= 0).mean())

    def __len__(self) -> int:
        return len(self._tokens["document_ids"])

    def batch(self, indices: npt.ArrayLike) -> dict[str, npt.NDArray[Any]]:
        """`input_ids` int64, `document_ids` int32 (-1 at padding), `loss_mask` bool; each [n, L]; values [n, D]."""
        rows = np.asarray(indices, dtype=np.int64)
        found = {name: array[rows] for name, array in (self._tokens | self._values).items()}
        found["input_ids"] = found["input_ids"].astype(np.int64)
        return found

    @property
    def most_documents(self) -> int:
        """Documents of the fullest sequence."""
        return int(self._tokens["document_ids"].max(initial=-1)) + 1

    @property
    def longest(self) -> int:
        """Tokens of the longest document: as many positions the model needs."""
        documents = self._tokens["document_ids"]
        edges = np.flatnonzero(np.diff(documents, axis=1, prepend=-2, append=-2).ravel())
        runs = np.diff(edges, append=documents.shape[0] * (documents.shape[1] + 1))
        inside = np.pad(documents, ((0, 0), (0, 1)), constant_values=-1).ravel()[edges] >= 0
        return int(runs[inside].max(initial=0))

    def with_values(self, name: str, values: npt.NDArray[Any]) -> PackedPairs:
        """The same sequences with one more value for each document, [n, D]."""
        return PackedPairs(self._tokens, self._values | {name: values})

    @classmethod
    def pack(cls, pairs: Sequence[Encoded], sequence_length: int, seed: int, pad_id: int = 0) -> PackedPairs:
        """First fit over the last open sequences, in an order shuffled by `seed`."""
        return cls.pack_groups([(pair,) for pair in pairs], sequence_length, seed, pad_id)

    @classmethod
    def alone(cls, pairs: Sequence[Encoded], seed: int, pad_id: int = 0) -> PackedPairs:
        """Each in a row of its own, as long as the longest, in an order shuffled by `seed`."""
        longest = max((len(pair.ids) for pair in pairs), default=1)
        return cls.pack_groups([(pair,) for pair in pairs], longest, seed, pad_id, together=False)

    @classmethod
    def pack_groups(
        cls,
        groups: Sequence[Sequence[Encoded]],
        sequence_length: int,
        seed: int,
        pad_id: int = 0,
        values: Values | None = None,
        *,
        together: bool = True,
    ) -> PackedPairs:
        """The same for groups of k documents each that stay together, in order: documents k i .. k i + k - 1 of a
        sequence are its group i. `values` [groups, k] go with them. A group must fit into a sequence. Without
        `together` each group has a sequence of its own. Labels of steps become `step_labels`, -1 at padding.
        """
        order = permute(np.arange(len(groups)), len(groups), seed)
        lengths = [sum(len(d.ids) for d in groups[i]) for i in order]
        rows = assign(lengths, sequence_length) if together else [[i] for i in range(len(groups))]
        shape, k = (len(rows), sequence_length), len(groups[0]) if groups else 1
        most = max((len(members) for members in rows), default=1)
        ids = np.full(shape, pad_id, dtype=np.int32)
        documents, learnt = np.full(shape, -1, dtype=np.int32), np.zeros(shape, dtype=bool)
        scored = bool(groups) and groups[0][0].labels is not None
        labels = np.full(shape if scored else 0, -1, dtype=np.float32)
        found = {name: np.zeros((len(rows), most * k), dtype=array.dtype) for name, array in (values or {}).items()}
        for row, members in enumerate(rows):
            at = number = 0
            for place, member in enumerate(members):
                for name, array in (values or {}).items():
                    found[name][row, place * k : place * k + k] = array[order[member]]
                for document in groups[order[member]]:
                    end = at + len(document.ids)
                    ids[row, at:end], documents[row, at:end] = document.ids, number
                    learnt[row, at:end] = document.learnt
                    if document.labels is not None:
                        labels[row, at:end] = document.labels
                    at, number = end, number + 1
        tokens = {"input_ids": ids, "document_ids": documents, "loss_mask": learnt}
        if scored:
            tokens["step_labels"] = labels
        return cls(tokens, found)

    def save(self, path: Path) -> None:
        """Writes the arrays for other processes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        named = {f"tokens.{n}": a for n, a in self._tokens.items()} | {
            f"values.{n}": a for n, a in self._values.items()
        }
        with path.open("wb") as handle:
            np.savez(handle, **cast(Any, named))

    @classmethod
    def load(cls, path: Path) -> PackedPairs:
        """Reads what :meth:`save` wrote; nothing pickled."""
        with np.load(path, allow_pickle=False) as arrays:
            parts: dict[str, dict[str, npt.NDArray[Any]]] = {"tokens": {}, "values": {}}
            for name in arrays.files:
                kind, _, field = name.partition(".")
                parts[kind][field] = arrays[name]
        return cls(parts["tokens"], parts["values"])


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
