"""Decides what runs in a step, and which blocks and slots it may use.

A sequence has tokens and the number of them already computed; a step computes the next piece of some
sequences within a token budget. A piece that reaches the end of a sequence yields its next token, so
decoding is the case "one token is missing", a long prompt is cut wherever the budget ends, and a guess of
several tokens is a longer piece.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field
from typing import Any

from modelyard.engine.blocks import Blocks, chain
from modelyard.engine.request import Request, TokenLogprob
from modelyard.engine.slots import Slots

LOOK_PAST = 4
"""Times the number of slots: queued requests looked at in a step while those before them wait for a shared prefix."""


@dataclass(slots=True, eq=False)
class Sequence:
    """A request in flight: its tokens so far and how many of them have cached keys and values.

    `arrived` is on the monotonic clock; `waited` is the time from then to the first step, in seconds.
    `draft` are guessed tokens after `tokens`, `blocks` the block table, `digests` name the contents of full blocks,
    the first `published` of which can be found by others. `scored`, `pooled` and `pool` gather what `score` and
    `embed` return; `matcher` and `adapter` belong to the grammar and the LoRA adapter. `greedy`, `penalized` and
    `measured` (prompt results are wanted) are asked in every step and follow from the request.
    """

    request: Request
    arrival: int
    arrived: float
    tokens: list[int]
    seed: int
    limit: int
    salt: bytes = b""
    waited: float = -1.0
    computed: int = 0
    slot: int = -1
    cached: int = 0
    draft: tuple[int, ...] = ()
    output_counts: dict[int, int] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    scored: list[TokenLogprob] = field(default_factory=list)
    pooled: int = 0
    pool: Any = None
    matcher: Any = None
    adapter: Any = None
    prompt_length: int = field(init=False)
    greedy: bool = field(init=False)
    penalized: bool = field(init=False)
    measured: bool = field(init=False)

    def __post_init__(self) -> None:
        request = self.request
        self.prompt_length = len(request.prompt)
        self.greedy, self.penalized = request.sampling.greedy, request.sampling.penalized
        self.measured = request.task != "generate" or request.prompt_logprobs is not None

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

    @property
    def reusable(self) -> int:
        """Tokens that may come from the prefix cache: never those whose results are still wanted."""
        limit = len(self.tokens) - 1
        if self.request.prompt_logprobs is not None:
            limit = min(limit, self.request.logprobs_from - 1 + len(self.scored))
        if self.request.task == "embed" and self.request.pooling == "mean":
            limit = min(limit, self.pooled)
        return max(0, limit)

    def restart(self) -> None:
        """Forgets what was gathered under other weights."""
        self.scored, self.pooled, self.pool = [], 0, None
        self.digests = []


@dataclass(slots=True)
class Piece:
    """`count` tokens of a sequence from position `start`; the last `guessed` of them are its draft's."""

    sequence: Sequence
    start: int
    count: int
    guessed: int = 0

    @property
    def tokens(self) -> list[int]:
        s, known = self.sequence, self.count - self.guessed
        return s.tokens[self.start : self.start + known] + list(s.draft[: self.guessed])

    @property
    def last(self) -> bool:
        """Whether the piece reaches the end of the tokens, so that at least one more is chosen."""
        return self.start + self.count - self.guessed == len(self.sequence.tokens)


@dataclass(frozen=True, slots=True)
class Step:
    """What to compute: `loads` (slot, blocks) are copied from the prefix cache to slots first."""

    pieces: list[Piece]
    loads: list[tuple[int, list[int]]]


def _one_first(sequence: Sequence) -> tuple[bool, tuple[int, int]]:
    return sequence.missing > 1, sequence.order


class Scheduler:
    """First come, first served within a priority; `budget` tokens a step; as many requests as slots and blocks allow.

    Args:
        slots: sequences computed in one step at most.
        budget: tokens computed in one step at most.
        blocks: the pool of key/value blocks; it must hold the longest sequence.
        prefix_cache: whether blocks are shared between requests with the same beginning.
    """

    def __init__(self, slots: int, budget: int, blocks: Blocks, *, prefix_cache: bool = True) -> None:
        self.slots, self.blocks, self.prefix_cache = Slots(slots), blocks, prefix_cache
        # Every running sequence must be able to advance by one token in a step.
        self.budget = max(budget, slots)
        self.running: list[Sequence] = []
        self._waiting: list[tuple[tuple[int, int], Sequence]] = []
        self._coming: dict[bytes, int] = {}
        self.preempted = self.hit_tokens = self.asked_tokens = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens that wait to be computed, of queued and running requests."""
        return sum(s.missing for _, s in list(self._waiting)) + sum(s.missing for s in list(self.running))

    def add(self, sequence: Sequence) -> None:
        heapq.heappush(self._waiting, (sequence.order, sequence))

    def schedule(self) -> Step:
        """The next step: running sequences first, oldest first; then queued ones while slots and blocks last."""
        pieces: dict[int, Piece] = {}
        left, before = self.budget, self.preempted
        # Sequences in the middle of their answer need one token each and must not wait for long prompts.
        several = any(s.missing > 1 for s in self.running)
        for sequence in sorted(self.running, key=_one_first) if several else list(self.running):
            if left == 0:
                break
            if sequence.slot < 0:  # preempted for the sake of an earlier one
                continue
            count = min(sequence.missing, left)
            # A guess takes what the budget leaves after one token for each of the others.
            guessed = min(len(sequence.draft), max(0, left - len(self.running))) if count == sequence.missing else 0
            while not self._grow(sequence, sequence.computed + count + guessed):
                victim = max(self.running, key=lambda s: s.order)
                left += self._take_back(pieces, victim)
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence.slot < 0:
                continue
            pieces[sequence.arrival] = Piece(sequence, sequence.computed, count + guessed, guessed)
            left -= count + guessed
        # Who was preempted must not come back for the blocks that were taken from it.
        loads = self._admit(pieces, left) if self.preempted == before else []
        return Step(list(pieces.values()), loads)

    @staticmethod
    def _take_back(pieces: dict[int, Piece], victim: Sequence) -> int:
        piece = pieces.pop(victim.arrival, None)
        return piece.count if piece else 0

    def _admit(self, pieces: dict[int, Piece], left: int) -> list[tuple[int, list[int]]]:
        """Starts queued sequences. One whose prefix another one is computing waits for it: later is cheaper."""
        loads: list[tuple[int, list[int]]] = []
        passed: list[tuple[tuple[int, int], Sequence]] = []
        while left > 0 and self._waiting and self.slots.can_allocate():
            item = heapq.heappop(self._waiting)
            sequence = item[1]
            shared = self._shared(sequence)
            if shared is None:
                passed.append(item)
                if len(passed) > LOOK_PAST * self.slots.count:
                    break
                continue
            if not self._start(sequence, shared):
                passed.append(item)
                break
            if shared:
                loads.append((sequence.slot, shared))
            pieces[sequence.arrival] = Piece(sequence, sequence.computed, min(sequence.missing, left))
            left -= pieces[sequence.arrival].count
        for item in passed:
            heapq.heappush(self._waiting, item)
        return loads

    def _shared(self, sequence: Sequence) -> list[int] | None:
        """Blocks of the prefix cache this sequence can begin with; None when more of them are being computed."""
        if not self.prefix_cache:
            return []
        digests = chain(sequence.tokens, self.blocks.size, sequence.salt, sequence.digests)
        found: list[int] = []
        for digest in digests[: sequence.reusable // self.blocks.size]:
            block = self.blocks.find(digest)
            if block is None:
                return None if digest in self._coming else found
            found.append(block)
        return found

    def _start(self, sequence: Sequence, shared: list[int]) -> bool:
        """Gives a queued sequence its slot and all blocks its tokens need, or nothing."""
        for block in shared:
            self.blocks.share(block)
        needed = self.blocks.needed(len(sequence.tokens) + 1) - len(shared)
        if needed > self.blocks.available:
            for block in reversed(shared):
                self.blocks.release(block)
            return False
        sequence.blocks = shared + [self.blocks.allocate() for _ in range(needed)]
        sequence.slot = self.slots.allocate()
        sequence.published = len(shared)
        sequence.computed = len(shared) * self.blocks.size
        if sequence.waited < 0:
            sequence.waited = time.monotonic() - sequence.arrived
            sequence.cached = sequence.computed
            self.asked_tokens += len(sequence.tokens)
            self.hit_tokens += sequence.computed
        self.running.append(sequence)
        self._expect(sequence, 1)
        return True

    def _expect(self, sequence: Sequence, by: int) -> None:
        """Notes (or, with -1, forgets) that the sequence will publish its remaining full blocks."""
        for digest in sequence.digests[sequence.published :]:
            count = self._coming.get(digest, 0) + by
            if count > 0:
                self._coming[digest] = count
            else:
                self._coming.pop(digest, None)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        while len(sequence.blocks) * self.blocks.size < tokens:
            if not self.blocks.available:
                return False
            sequence.blocks.append(self.blocks.allocate())
        return True

    def publish(self, sequence: Sequence) -> list[tuple[int, int]]:
        """Makes the full blocks computed so far findable: (index in the sequence, block) to copy to the store."""
        if not self.prefix_cache:
            return []
        full = sequence.computed // self.blocks.size
        if full <= sequence.published:
            return []
        fresh = []
        chain(sequence.tokens[: sequence.computed], self.blocks.size, sequence.salt, sequence.digests)
        for index in range(sequence.published, full):
            digest = sequence.digests[index]
            count = self._coming.get(digest, 0) - 1
            if count > 0:
                self._coming[digest] = count
            else:
                self._coming.pop(digest, None)
            if self.blocks.publish(sequence.blocks[index], digest):
                fresh.append((index, sequence.blocks[index]))
        sequence.published = full
        return fresh

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out, running or waiting, and gives its slot and blocks back."""
        if sequence.slot >= 0:
            self._release(sequence)
            return
        self._waiting = [item for item in self._waiting if item[1] is not sequence]
        heapq.heapify(self._waiting)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.slots.release(sequence.slot)
        if self.prefix_cache:
            self._expect(sequence, -1)
        # The end of a prefix goes first, so that eviction shortens chains instead of beheading them.
        for block in reversed(sequence.blocks):
            self.blocks.release(block)
        sequence.blocks, sequence.slot, sequence.computed, sequence.published = [], -1, 0, 0

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the queue; its published blocks stay findable, so little is computed twice when it returns."""
        self._release(sequence)
        sequence.draft = ()
        self.preempted += 1
        self.add(sequence)

    def recompute(self) -> None:
        """Forgets all cached keys and values: running sequences go back to the queue with their tokens."""
        for sequence in list(self.running):
            self._release(sequence)
            self.add(sequence)
        for _, sequence in self._waiting:
            sequence.restart()
        self.blocks.forget()

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping; an empty list when nothing is."""
        owned = [s.slot for s in self.running]
        faults = self.blocks.invariants([s.blocks for s in self.running])
        if len(set(owned)) != len(owned):
            faults.append(f"two sequences share a slot: {sorted(owned)}")
        if set(owned) != self.slots.occupied():
            faults.append(f"slots {sorted(self.slots.occupied())} are taken, sequences own {sorted(owned)}")
        for s in self.running:
            if s.missing < 0:
                faults.append(f"{s.request.id} has computed {s.computed} of {len(s.tokens)}")
            if len(s.blocks) * self.blocks.size < s.computed:
                faults.append(f"{s.request.id} has computed {s.computed} tokens in {len(s.blocks)} blocks")
        if any(s.blocks or s.slot >= 0 or s.computed for _, s in self._waiting):
            faults.append("a waiting sequence holds a slot or blocks")
        expected: dict[bytes, int] = {}
        for s in self.running:
            for digest in s.digests[s.published :]:
                expected[digest] = expected.get(digest, 0) + 1
        if self.prefix_cache and expected != self._coming:
            faults.append("the digests being computed do not match the running sequences")
        return faults
