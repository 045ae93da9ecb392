"""The scheduler's promises, for any mix of prompts, budgets and endings."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.engine import Request, Sampling
from modelyard.engine.scheduler import Scheduler, Sequence


def sequence(name: int, prompt: int, priority: int = 0) -> Sequence:
    request = Request(str(name), tuple(range(prompt)), Sampling(), priority)
    return Sequence(request, name, 0.0, list(range(prompt)), 0, 100)


def advance(scheduler: Scheduler, ending: set[int]) -> list[tuple[str, int]]:
    """One step as the engine does it; sequences whose name is in `ending` end with their next token."""
    done = []
    for piece in scheduler.schedule():
        last = piece.last
        piece.sequence.computed += piece.count
        done.append((piece.sequence.request.id, piece.count))
        if last:
            piece.sequence.tokens.append(0)
            if int(piece.sequence.request.id) in ending:
                scheduler.finish(piece.sequence)
    return done


@settings(max_examples=100, deadline=None)
@given(
    prompts=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    slots=st.integers(1, 5),
    budget=st.integers(1, 40),
)
def test_every_sequence_runs_within_the_budget_and_no_slot_leaks(prompts: list[int], slots: int, budget: int) -> None:
    scheduler = Scheduler(slots, budget)
    for name, prompt in enumerate(prompts):
        scheduler.add(sequence(name, prompt))
    ran: dict[str, int] = {}
    for step in range(10_000):
        scheduler.compact()
        assert scheduler.slots.height == scheduler.slots.used
        done = advance(scheduler, ending=set(range(step % 7, 12)))
        assert sum(count for _, count in done) <= scheduler.budget
        assert scheduler.invariants() == []
        for name, count in done:
            ran[name] = ran.get(name, 0) + count
        if not done:
            break
    assert len(ran) == len(prompts)
    assert all(ran[str(i)] >= n for i, n in enumerate(prompts))
    assert scheduler.slots.used == 0
    assert scheduler.waiting == 0


def test_answers_in_progress_advance_beside_a_long_prompt() -> None:
    scheduler = Scheduler(4, 8)
    scheduler.add(sequence(0, 4))
    advance(scheduler, set())
    scheduler.add(sequence(1, 100))
    for _ in range(5):
        assert ("0", 1) in advance(scheduler, set())


def test_priority_first_then_arrival() -> None:
    scheduler = Scheduler(1, 100)
    for name, priority in ((0, 1), (1, 0), (2, 0), (3, -1)):
        scheduler.add(sequence(name, 3, priority))
    order = [advance(scheduler, {0, 1, 2, 3})[0][0] for _ in range(4)]
    assert order == ["3", "1", "2", "0"]


def test_finishing_a_waiting_sequence_takes_it_out() -> None:
    scheduler = Scheduler(1, 10)
    first, second = sequence(0, 3), sequence(1, 3)
    scheduler.add(first)
    scheduler.add(second)
    scheduler.schedule()
    scheduler.finish(second)
    assert scheduler.waiting == 0
    assert scheduler.running == [first]
    assert scheduler.invariants() == []
