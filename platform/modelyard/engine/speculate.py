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

from modelyard.engine.batch import lay_out
from modelyard.engine.cache import Cache
from modelyard.engine.checkpoint import check_folder, read_config, read_tensors
from modelyard.engine.decoder import Decoder
from modelyard.engine.options import Precision, Speculation
from modelyard.engine.sampler import sample
from modelyard.engine.scheduler import Piece, Sequence
from modelyard.engine.weights import Weights
from modelyard.errors import DataError

LOOK_BACK = 4096
"""Tokens searched for an earlier occurrence of the last ones."""


class Guesser(Protocol):
    """Proposes tokens that may follow."""

    def guess(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """Guesses for sequences that are about to choose a token, at most `tokens` of the options each."""
        ...

    def recompute(self) -> None:
        """Forgets cached keys and values."""
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

    def recompute(self) -> None:
        """See `Guesser.recompute`."""


class DraftModel:
    """A small model of the same vocabulary that runs ahead of the large one.

    Args:
        options: which model, how far.
        vocabulary: of the large model.
        slots: of the large model; the draft uses the same slot numbers.
        length: tokens a slot holds.
        precision: of the draft's matrices.

    Raises:
        DataError: the folder cannot be read or has another vocabulary.
    """

    def __init__(
        self, options: Speculation, vocabulary: int, slots: int, length: int, precision: Precision, threads: int
    ) -> None:
        if options.model is None:
            raise DataError(
                "draft_model needs a model", place="speculation.model", mend="name the small model's folder"
            )
        folder = Path(options.model)
        check_folder(folder)
        config = read_config(folder)
        if config.vocabulary != vocabulary:
            raise DataError(
                f"the draft model has {config.vocabulary} tokens, the model {vocabulary}",
                place=options.model,
                mend="use a draft of the same vocabulary",
            )
        weights = Weights(config, precision)
        weights.load(read_tensors(folder), options.model)
        self._options, self._length = options, min(config.positions, length)
        self._decoder = Decoder(weights, Cache(config, slots, self._length), self._length, threads)
        self._computed: dict[int, tuple[int, int]] = {}

    def guess(self, sequences: list[Sequence]) -> list[tuple[int, ...]]:
        """See `Guesser.guess`. One step of the draft for each guessed token, all sequences together."""
        able = [s for s in sequences if len(s.tokens) + self._options.tokens < self._length]
        shadows = [_shadow(s) for s in able]
        for shadow in shadows:
            owner, computed = self._computed.get(shadow.slot, (-1, 0))
            # What was guessed and rejected is overwritten; another sequence's slot begins again.
            shadow.computed = min(computed, len(shadow.tokens) - 1) if owner == shadow.arrival else 0
        for _ in range(self._options.tokens if shadows else 0):
            batch = lay_out([Piece(s, s.computed, s.missing) for s in shadows])
            owners = [span.piece.sequence for span in batch.spans]
            choices = sample(self._decoder.logits(self._decoder.forward(batch)), owners)
            for shadow, choice in zip(owners, choices, strict=True):
                shadow.computed = len(shadow.tokens)
                shadow.tokens.append(max(choice.token, 0))
        guesses = {}
        for sequence, shadow in zip(able, shadows, strict=True):
            guesses[sequence.arrival] = tuple(shadow.tokens[len(sequence.tokens) :])
            # Valid as far as the real tokens reach; guesses that turn out right are computed again, cheaply.
            self._computed[shadow.slot] = (shadow.arrival, len(sequence.tokens))
        return [guesses.get(s.arrival, ()) for s in sequences]

    def recompute(self) -> None:
        """See `Guesser.recompute`."""
        self._computed.clear()


def _shadow(sequence: Sequence) -> Sequence:
    """A copy to run ahead with: the same seed and slot, no adapter, no draft."""
    return replace(sequence, tokens=list(sequence.tokens), draft=(), adapter=None, blocks=[], digests=[])
