"""Who is preferred for a prompt, how many replicas a load asks for, and the warm-up: plain, without Ray."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

from modelyard.engine import EngineOptions, NativeEngine
from modelyard.engine.request import Request
from modelyard.serving.affinity import HOLDERS, Affinity, most_urgent
from modelyard.serving.scaling import KV_USED, WAITING_TOKENS, EngineLoad, desired_replicas
from modelyard.serving.warm import requests, warm_up


def request(*tokens: int, adapter: str | None = None) -> Request:
    return Request("r", tuple(tokens), adapter=adapter)


def test_the_longest_known_beginning_decides() -> None:
    memory = Affinity(block=2, remembered=100)
    memory.remember(memory.keys(request(1, 2, 3, 4, 5)), "a")
    memory.remember(memory.keys(request(1, 2, 9, 9)), "b")
    everyone = ("a", "b")
    assert memory.holders(memory.keys(request(1, 2, 3, 4, 7, 7)), everyone) == ("a",)
    assert memory.holders(memory.keys(request(1, 2, 9, 9, 3)), everyone) == ("b",)
    assert memory.holders(memory.keys(request(1, 2, 7)), everyone) == ("b", "a")
    assert memory.holders(memory.keys(request(2, 1, 3, 4)), everyone) == ()
    assert memory.holders(memory.keys(request(1, 2, 9, 9)), ("a",)) == ("a",)  # b has gone
    assert memory.keys(request(1)) == []  # less than a block


def test_an_adapter_is_a_beginning_of_its_own() -> None:
    memory = Affinity(block=2, remembered=100)
    memory.remember(memory.keys(request(1, 2, adapter="german")), "a")
    assert memory.holders(memory.keys(request(8, 8, adapter="german")), ("a", "b")) == ("a",)
    assert memory.holders(memory.keys(request(1, 2)), ("a", "b")) == ()


def test_the_first_of_the_most_urgent_goes_next() -> None:
    assert most_urgent([0, None, -2, 5, -2]) == 2
    assert most_urgent([None, 7]) == 1
    assert most_urgent([None]) is None and most_urgent([]) is None


def test_memory_is_bounded() -> None:
    memory = Affinity(block=1, remembered=10)
    for token in range(100):
        memory.remember(memory.keys(request(token)), "a")
    assert memory.holders(memory.keys(request(5)), ("a",)) == ()
    assert memory.holders(memory.keys(request(99)), ("a",)) == ("a",)
    for name in "abcdefgh":
        memory.remember(memory.keys(request(99)), name)
    assert memory.holders(memory.keys(request(99)), "abcdefgh") == tuple("hgfe")[:HOLDERS]


def test_replicas_follow_the_engines_load() -> None:
    def ask(kv: list[float], waiting: list[float], queued: float = 0.0, ongoing: float = 1.0) -> float:
        return desired_replicas(kv, waiting, queued=queued, ongoing=ongoing, kv_target=0.5, tokens_target=1000,
                                sequences=8)  # fmt: skip

    assert ask([0.5], [0.0]) == 1.0
    assert ask([1.0], [0.0]) == 2.0
    assert ask([1.0, 1.0], [3000.0, 1000.0]) == 8.0
    assert ask([0.0], [0.0], queued=16.0) == 2.0
    assert ask([0.1], [0.0]) == 1.0  # one short request keeps a replica
    assert ask([0.0, 0.0], [0.0, 0.0], ongoing=0.0) == 0.0


def test_the_policy_reads_what_serve_hands_it() -> None:
    policy = EngineLoad(kv_target=0.5, tokens_target=1000, sequences=8)
    metrics = {KV_USED: {"r1": 1.0, "r2": 0.5}, WAITING_TOKENS: {"r1": 500.0, "r2": 0.0}}
    context = SimpleNamespace(current_num_replicas=2, target_num_replicas=2, aggregated_metrics=metrics,
                              total_queued_requests=0.0, total_num_requests=9.0)  # fmt: skip
    assert policy(context) == (3.5, {})
    context.current_num_replicas, context.target_num_replicas = 0, 0
    assert policy(context) == (0, {})


def test_the_warm_up_leaves_an_engine_idle_whatever_its_size(tiny_model: Path) -> None:
    for options in (EngineOptions(max_sequences=4, threads=1), EngineOptions(
        max_sequences=1, max_waiting=0, max_length=6, step_tokens=4, threads=1
    )):  # fmt: skip
        engine = NativeEngine(tiny_model, options)
        assert warm_up(engine, options) > 0
        assert max(len(r.prompt) for r in requests(engine, options)) + 4 <= engine.max_length
        stats = engine.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.finished_total >= 2
        assert engine.invariants() == []
        engine.close()
