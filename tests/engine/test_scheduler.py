"""The promises of scheduler and block pool, for any mix of prompts, budgets, priorities, endings and shortages."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from modelyard.engine import Request, Sampling
from modelyard.engine.blocks import Blocks, chain
from modelyard.engine.scheduler import Scheduler, Sequence

SIZE = 4


def scheduler(slots: int = 4, budget: int = 100, blocks: int = 200) -> Scheduler:
    return Scheduler(slots, budget, Blocks(blocks, SIZE))


def sequence(name: int, tokens: list[int], priority: int = 0) -> Sequence:
    request = Request(str(name), tuple(tokens), Sampling(), priority)
    return Sequence(request, name, 0.0, list(tokens), 0, 100)


def advance(s: Scheduler, ending: set[int] = frozenset()) -> list[tuple[str, int]]:  # type: ignore[assignment]
    """One step as the engine does it; sequences whose name is in `ending` end with their next token."""
    done = []
    for piece in s.schedule().pieces:
        piece.sequence.computed += piece.count
        done.append((piece.sequence.request.id, piece.count))
        s.publish(piece.sequence)
        if piece.last:
            piece.sequence.tokens.append(0)
            if int(piece.sequence.request.id) in ending:
                s.finish(piece.sequence)
    return done


class Engine(RuleBasedStateMachine):
    """Requests come, are computed, grow, end and are aborted in any order, with few blocks and many shared prefixes.

    The store is modelled too: a block holds the tokens that were saved to it, and what is loaded must be the
    sequence's own beginning.
    """

    def __init__(self) -> None:
        super().__init__()
        self.longest = 40
        self.s = Scheduler(3, 16, Blocks(14, SIZE))
        self.known: dict[str, Sequence] = {}
        self.store: dict[int, tuple[int, ...]] = {}
        self.count = 0

    @rule(
        shared=st.sampled_from([0, 4, 8, 20]),
        own=st.lists(st.integers(1, 3), min_size=1, max_size=12),
        priority=st.integers(-1, 1),
        family=st.integers(7, 8),
    )
    def arrive(self, shared: int, own: list[int], priority: int, family: int) -> None:
        self.count += 1
        new = sequence(self.count, [family] * shared + own, priority)
        self.known[new.request.id] = new
        self.s.add(new)

    @precondition(lambda self: self.known)
    @rule(draft=st.integers(0, 3), endings=st.integers(0, 7))
    def step(self, draft: int, endings: int) -> None:
        for running in self.s.running:
            running.draft = (9,) * draft if running.missing == 1 else ()
        plan = self.s.schedule()
        assert plan.pieces, "somebody can always run"
        assert sum(p.count for p in plan.pieces) <= self.s.budget
        assert len({p.sequence.slot for p in plan.pieces}) == len(plan.pieces)
        by_slot = {p.sequence.slot: p.sequence for p in plan.pieces}
        for slot, blocks in plan.loads:
            loaded = [t for b in blocks for t in self.store[b]]
            assert by_slot[slot].tokens[: len(loaded)] == loaded
            assert by_slot[slot].computed == len(loaded) < len(by_slot[slot].tokens)
        for number, piece in enumerate(plan.pieces):
            self._compute(piece.sequence, piece.count - piece.guessed, piece.last, endings >> number & 1)

    def _compute(self, s: Sequence, count: int, last: bool, ends: int) -> None:
        s.computed += count
        s.draft = ()
        if last:
            s.tokens.append(1 + len(s.tokens) % 3)
        for index, block in self.s.publish(s):
            self.store[block] = tuple(s.tokens[index * SIZE : (index + 1) * SIZE])
        if last and (ends or len(s.tokens) >= self.longest):
            self.s.finish(s)
            del self.known[s.request.id]

    @precondition(lambda self: self.known)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        name = sorted(self.known)[which % len(self.known)]
        self.s.finish(self.known.pop(name))

    @rule()
    def new_weights(self) -> None:
        self.s.recompute()
        self.store.clear()

    @invariant()
    def nothing_leaks(self) -> None:
        assert self.s.invariants() == []
        assert self.s.waiting + len(self.s.running) == len(self.known)

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.known:
                break
            self.step(draft=0, endings=7)
        assert not self.known
        assert self.s.slots.used == self.s.blocks.used == 0
        assert self.s.invariants() == []


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_answers_in_progress_advance_beside_a_long_prompt() -> None:
    s = scheduler(budget=8)
    s.add(sequence(0, [1] * 4))
    advance(s)
    s.add(sequence(1, [2] * 100))
    for _ in range(5):
        assert ("0", 1) in advance(s)


def test_priority_first_then_arrival() -> None:
    s = scheduler(slots=1)
    for name, priority in ((0, 1), (1, 0), (2, 0), (3, -1)):
        s.add(sequence(name, [name] * 3, priority))
    order = [advance(s, {0, 1, 2, 3})[0][0] for _ in range(4)]
    assert order == ["3", "1", "2", "0"]


def test_finishing_a_waiting_sequence_takes_it_out() -> None:
    s = scheduler(slots=1)
    first, second = sequence(0, [1, 2, 3]), sequence(1, [1, 2, 3])
    s.add(first)
    s.add(second)
    s.schedule()
    s.finish(second)
    assert s.waiting == 0
    assert s.running == [first]
    assert s.invariants() == []


def test_samples_of_one_prompt_compute_it_once() -> None:
    s = scheduler(slots=8)
    for name in range(8):
        s.add(sequence(name, [*range(10, 50), 1]))
    assert advance(s) == [("0", 41)]
    assert advance(s) == [("0", 1), *((str(i), 1) for i in range(1, 8))]
    assert s.blocks.used == 10 + 8, "ten shared blocks, and one of its own for each"


def test_a_prefix_survives_its_request_until_its_room_is_needed() -> None:
    s = scheduler(blocks=8)
    s.add(sequence(0, [5] * 16 + [1]))
    advance(s, {0})
    assert (s.blocks.used, s.blocks.idle) == (0, 4)
    s.add(sequence(1, [5] * 16 + [2]))
    assert advance(s, {1}) == [("1", 1)]
    s.add(sequence(2, [6] * 30))
    assert advance(s, {2}) == [("2", 30)]
    s.add(sequence(3, [5] * 16 + [3]))
    assert advance(s, {3}) == [("3", 17)], "it was thrown out for the longer one"


def test_a_shortage_of_blocks_preempts_the_youngest_and_all_finish() -> None:
    s = scheduler(slots=3, blocks=9)
    for name in range(3):
        s.add(sequence(name, [name + 1] * 8))
    seen = set()
    for _ in range(40):
        seen |= {
            name
            for name, _ in advance(
                s, {i for i in range(3) if any(r.arrival == i and len(r.tokens) > 20 for r in s.running)}
            )
        }
        assert s.invariants() == []
    assert seen == {"0", "1", "2"}
    assert s.preempted > 0
    assert s.blocks.used == s.waiting == len(s.running) == 0


def test_what_is_to_be_scored_is_not_taken_from_the_cache() -> None:
    s = scheduler()
    s.add(sequence(0, [5] * 40))
    advance(s, {0})
    request = Request("1", (5,) * 40, task="score", prompt_logprobs=0, logprobs_from=17)
    s.add(Sequence(request, 1, 0.0, [5] * 40, 0, 0))
    assert advance(s, {1}) == [("1", 24)], "positions 16 .. 39 give the probabilities of 17 .."


def test_digests_depend_on_all_before_and_on_the_adapter() -> None:
    one, other = chain([1, 2, 3, 4, 5, 6], 2, b"", []), chain([9, 2, 3, 4, 5, 6], 2, b"", [])
    assert len(one) == 3
    assert not set(one) & set(other)
    assert not set(one) & set(chain([1, 2, 3, 4, 5, 6], 2, b"adapter", []))
    assert chain([1, 2, 3, 4, 7, 7], 2, b"", [])[:2] == one[:2]


def test_releasing_what_nobody_holds_is_an_error() -> None:
    blocks = Blocks(2, 4)
    with pytest.raises(KeyError):
        blocks.release(0)
    blocks.allocate()
    blocks.allocate()
    with pytest.raises(IndexError):
        blocks.allocate()
