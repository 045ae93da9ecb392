"""Decides what runs in a step.

A sequence has tokens and the number of them already computed; a step computes the next piece of some
sequences within a token budget. A piece that reaches the end of a sequence yields its next token, so
decoding is the case "one token is missing" and a long prompt is cut wherever the budget ends.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field

from modelyard.engine.request import Request
from modelyard.engine.slots import Slots


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in flight: its tokens so far and how many of them have cached keys and values.

    `arrived` is on the monotonic clock; `waited` is the time from then to the first step, in seconds.
    """

    request: Request
    arrival: int
    arrived: float
    tokens: list[int]
    seed: int
    limit: int
    waited: float = 0.0
    computed: int = 0
    slot: int = -1
    output_counts: dict[int, int] = field(default_factory=dict)

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be chosen."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[int, int]:
        return self.request.priority, self.arrival


@dataclass(frozen=True, slots=True)
class Piece:
    """`count` tokens of a sequence, from its first one that is not computed."""

    sequence: Sequence
    count: int

    @property
    def start(self) -> int:
        return self.sequence.computed

    @property
    def last(self) -> bool:
        """Whether the piece reaches the end, so that a token is chosen."""
        return self.count == self.sequence.missing


class Scheduler:
    """First come, first served within a priority, one slot a sequence, `budget` tokens a step."""

    def __init__(self, slots: int, budget: int) -> None:
        self.slots = Slots(slots)
        # Every running sequence must be able to advance by one token in a step.
        self.budget = max(budget, slots)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be computed, of queued and running requests."""
        return sum(s.missing for _, s in list(self._waiting)) + sum(s.missing for s in list(self.running))

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def schedule(self) -> list[Piece]:
        """The next step: running sequences first, oldest first; then queued ones while slots last."""
        pieces: list[Piece] = []
        left = self.budget
        # Sequences in the middle of their answer need one token each and must not wait for long prompts.
        for sequence in sorted(self.running, key=lambda s: (s.missing > 1, s.order)):
            if left == 0:
                break
            pieces.append(Piece(sequence, min(sequence.missing, left)))
            left -= pieces[-1].count
        while left > 0 and self._waiting and self.slots.can_allocate():
            sequence = heapq.heappop(self._waiting)[1]
            sequence.slot = self.slots.allocate()
            sequence.waited = time.monotonic() - sequence.arrived
            self.running.append(sequence)
            pieces.append(Piece(sequence, min(sequence.missing, left)))
            left -= pieces[-1].count
        return pieces

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, running or waiting, and gives its slot back."""
        if sequence.slot >= 0:
            self.running.remove(sequence)
            self.slots.release(sequence.slot)
            sequence.slot = -1
            return
        self._waiting = [item for item in self._waiting if item[1] is not sequence]
        heapq.heapify(self._waiting)

    def compact(self) -> list[tuple[int, int, int]]:
        """Moves sequences down into holes: (from slot, to slot, tokens) for the cache to copy, in order."""
        moves = []
        while (hole := self.slots.hole()) is not None:
            top, free = hole
            sequence = next(s for s in self.running if s.slot == top)
            self.slots.release(top)
            sequence.slot = self.slots.allocate()
            moves.append((top, free, sequence.computed))
        return moves

    def recompute(self) -> None:
        """Forgets all cached keys and values; the sequences keep their tokens and slots."""
        for sequence in self.running:
            sequence.computed = 0

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping; an empty list when nothing is."""
        owned = [s.slot for s in self.running]
        faults = []
        if len(set(owned)) != len(owned):
            faults.append(f"two sequences share a slot: {sorted(owned)}")
        if set(owned) != self.slots.occupied():
            faults.append(f"slots {sorted(self.slots.occupied())} are taken, sequences own {sorted(owned)}")
        faults += [
            f"{s.request.id} has computed {s.computed} of {len(s.tokens)}" for s in self.running if s.missing < 0
        ]
        return faults
