"""Guessing tokens ahead (speculative decoding, arXiv:2211.17192): several tokens a step when the guess is right.

The sampler chooses a token by inverting the target's cumulative distribution at a number that depends on the seed
and the position alone. A guess is kept exactly when it equals that choice, so the answer is, token by token, the
one the engine would give without guessing; a guess x is kept with the target's probability of x, as the
rejection rule has it. The draft model draws with the same numbers, which makes agreement more likely than
independent draws would.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Protocol

from torch import Tensor

from modelyard.engine.batch import StepBatch, lay_out
from modelyard.engine.checkpoint import DecoderConfig, check_folder, read_config
from modelyard.engine.options import Speculation
from modelyard.engine.sampler import sample
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.errors import DataError

LOOK_BACK = 4096
"""Tokens searched for an earlier occurrence of the last ones."""


class Guesser(Protocol):
    """Proposes tokens that may follow."""

    def guess(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """Guesses for sequences that are about to choose a token, at most `tokens` of the options each."""
        ...


class PromptLookup:
    """What followed the last `ngram` tokens when they last occurred; good for summaries, code, repetitive answers."""

    def __init__(self, options: Speculation) -> None:
        self._options = options

    def guess(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """See `Guesser.guess`."""
        return [self._one(s.tokens) for s in sequences]

    def _one(self, tokens: list[int]) -> tuple[int, ...]:
        size = self._options.ngram
        if len(tokens) <= size:
            return ()
        ending, first = tokens[-size:], tokens[-size]
        for at in range(len(tokens) - size - 1, max(-1, len(tokens) - LOOK_BACK), -1):
            if tokens[at] == first and tokens[at : at + size] == ending:
                return tuple(tokens[at + size : at + size + self._options.tokens])
        return ()


class Drafts(Protocol):
    """The decoder of a draft model."""

    def forward(self, batch: StepBatch) -> Tensor:
        """Results of the last layer for the wanted rows."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all tokens, float32 [rows, vocabulary]."""
        ...


def draft_config(options: Speculation, vocabulary: int) -> tuple[Path, DecoderConfig]:
    """The draft model's folder and shape. Raises DataError when it cannot be read or has another vocabulary."""
    if options.model is None:
        raise DataError("draft_model needs a model", place="speculation.model", mend="name the small model's folder")
    folder = Path(options.model)
    check_folder(folder)
    config = read_config(folder)
    if config.vocabulary != vocabulary:
        raise DataError(
            f"the draft model has {config.vocabulary} tokens, the model {vocabulary}",
            place=options.model,
            mend="use a draft of the same vocabulary",
        )
    return folder, config


class DraftModel:
    """A small model of the same vocabulary that runs ahead of the large one.

    Args:
        options: how far.
        decoder: the small model's, with room for `slots` sequences: contiguous slots, or as many blocks each.
        slots: sequences it runs ahead of in one step at most.
        length: tokens of a slot.
        size: tokens of a block.
    """

    def __init__(self, options: Speculation, decoder: Drafts, slots: int, length: int, size: int) -> None:
        self._options, self.decoder, self._length = options, decoder, length
        self._blocks = -(-length // size)
        self._free = list(range(slots))
        # By arrival, least recently used first: the slot, and how many of its tokens are computed.
        self._held: dict[int, tuple[int, int]] = {}

    def guess(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """See `Guesser.guess`. One step of the draft for each guessed token, all sequences together."""
        able = [s for s in sequences if len(s.tokens) + self._options.tokens < self._length]
        shadows = self._shadows(able)
        for _ in range(self._options.tokens if shadows else 0):
            batch = lay_out([Piece(s, s.computed, s.missing) for s in shadows])
            owners = [span.piece.sequence for span in batch.spans]
            choices = sample(self.decoder.logits(self.decoder.forward(batch)), owners)
            for shadow, choice in zip(owners, choices, strict=True):
                shadow.computed = len(shadow.tokens)
                shadow.tokens.append(max(choice.token, 0))
        guesses = {}
        for sequence, shadow in zip(able, shadows, strict=True):
            guesses[sequence.arrival] = tuple(shadow.tokens[len(sequence.tokens) :])
            # Valid as far as the real tokens reach; guesses that turn out right are computed again, cheaply.
            self._held[sequence.arrival] = (shadow.slot, len(sequence.tokens))
        return [guesses.get(s.arrival, ()) for s in sequences]

    def _shadows(self, able: list[Sequence]) -> list[Sequence]:
        """Copies to run ahead with: the same seeds, slots of the draft's, no adapter, no draft."""
        found = {s.arrival: self._held.pop(s.arrival) for s in able if s.arrival in self._held}
        shadows = []
        for s in able:
            slot, computed = found.get(s.arrival) or (self._slot(), 0)
            blocks = list(range(slot * self._blocks, (slot + 1) * self._blocks))
            # What was guessed and rejected is overwritten.
            shadows.append(
                replace(s, tokens=list(s.tokens), draft=(), adapter=None, slot=slot, blocks=blocks, digests=[],
                        computed=min(computed, len(s.tokens) - 1))
            )  # fmt: skip
        return shadows

    def _slot(self) -> int:
        if self._free:
            return self._free.pop()
        return self._held.pop(next(iter(self._held)))[0]
