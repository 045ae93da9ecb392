"""Tasks and answers of reinforcement learning, and answers packed into training sequences."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from modelyard.align.answered import Answered
from modelyard.align.options import RolloutOptions
from modelyard.train.pairs import assign

Arrays = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Prompt:
    """A task as token ids, with its record for the verifiers."""

    ids: tuple[int, ...]
    text: str
    row: Mapping[str, Any] = field(hash=False)
    place: str


@dataclass(frozen=True)
class Drawn:
    """One answer as an engine drew it.

    Attributes:
        tokens: what was written.
        logprobs: natural logarithm of each token's probability when it was drawn, by whichever weights drew it.
        text: the tokens as text.
        ended: whether it ended by itself, not at its greatest length.
        version: of the weights that drew the last token.
        first: of the weights that drew the first one.
        learnt: which tokens it wrote itself; the others it was told (their logprobs are 0). Empty = all.
        turns: what it wrote and what it was told, in turns, where it was told anything.
        earned: what its environment paid.
        failure: why its environment broke it off; empty = it did not.
        prompt: what its environment asked in the place of what was to be answered; None = nothing else.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    ended: bool
    version: int
    first: int = 0
    learnt: tuple[bool, ...] = ()
    turns: tuple[str, ...] = ()
    earned: float = 0.0
    failure: str = ""
    prompt: Prompt | None = None

    @property
    def written(self) -> tuple[int, ...]:
        """The tokens of its own."""
        if not self.learnt:
            return self.tokens
        return tuple(token for token, own in zip(self.tokens, self.learnt, strict=True) if own)


@dataclass(frozen=True)
class Sample:
    """One answer with its prompt."""

    prompt: Prompt
    drawn: Drawn

    def answered(self, after: Sequence[int] = ()) -> Answered:
        """For who rewards it; `after` are the tokens a chat template puts behind an answer that has ended."""
        prompt, drawn = self.prompt, self.drawn
        ids = (*prompt.ids, *drawn.tokens, *(after if drawn.ended else ()))
        return Answered(
            prompt.row, prompt.place, prompt.text, drawn.text, ids, drawn.earned, drawn.failure, len(prompt.ids)
        )


class Prompts:
    """Tasks of a run. `len` is what the budget in epochs counts."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = list(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, indices: npt.ArrayLike) -> Mapping[str, Any]:
        """Prompts are not sequences to learn from: rollouts make those."""
        raise NotImplementedError("prompts are answered, not trained on")

    @classmethod
    def read(cls, path: Path) -> Prompts:
        """From JSON lines with ids, text, row and place."""
        with path.open(encoding="utf-8") as handle:
            rows = [json.loads(line) for line in handle]
        return cls([Prompt(tuple(r["ids"]), r["text"], r["row"], r["place"]) for r in rows])


def pack(
    samples: Sequence[Sample], gains: npt.NDArray[np.float64], options: RolloutOptions, pad: int,
    reference: Sequence[Sequence[float]] | None = None,
) -> Arrays:  # fmt: skip
    """Prompts with their answers packed whole into sequences of `options.rows` tokens or the longest, as arrays."""
    lengths = [len(s.prompt.ids) + len(s.drawn.tokens) for s in samples]
    width = max([options.rows, *lengths])
    rows = assign(lengths, width)
    most = max((len(members) for members in rows), default=1)
    shape = (len(rows), width)
    found: Arrays = {
        "input_ids": np.full(shape, pad, dtype=np.int64),
        "document_ids": np.full(shape, -1, dtype=np.int32),
        "loss_mask": np.zeros(shape, dtype=bool),
        "engine": np.zeros(shape, dtype=np.float32),
        "advantage": np.zeros((len(rows), most), dtype=np.float32),
    }
    if reference is not None:
        found["reference"] = np.zeros(shape, dtype=np.float32)
    for row, members in enumerate(rows):
        at = 0
        for number, member in enumerate(members):
            sample = samples[member]
            begin, end = at + len(sample.prompt.ids), at + lengths[member]
            found["input_ids"][row, at:end] = (*sample.prompt.ids, *sample.drawn.tokens)
            found["document_ids"][row, at:end] = number
            found["loss_mask"][row, begin:end] = sample.drawn.learnt or True
            found["engine"][row, begin:end] = sample.drawn.logprobs
            found["advantage"][row, number] = gains[member]
            if reference is not None:
                found["reference"][row, begin:end] = reference[member]
            at = end
    return found


def empty_like(arrays: Arrays, device: torch.device) -> dict[str, torch.Tensor]:
    """One sequence that is all padding, so that every worker makes the same number of forward passes."""
    batch = {n: torch.zeros((1, *a.shape[1:]), dtype=torch.from_numpy(a[:0]).dtype) for n, a in arrays.items()}
    batch["document_ids"].fill_(-1)
    return {name: value.to(device) for name, value in batch.items()}
