"""The engine behind its asynchronous interface: many readers, early leavers, closing."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelyard.engine import Engine, EngineCore, EngineOptions, NativeEngine, Request, Sampling, StepOutput, generate
from modelyard.engine.checkpoint import read_tensors
from modelyard.engine.request import EngineStopped
from modelyard.errors import DataError

GREEDY = Sampling(max_tokens=30, temperature=0.0, ignore_eos=True)


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[NativeEngine]:
    engine = NativeEngine(tiny_model, EngineOptions(max_sequences=4, step_tokens=32))
    yield engine
    engine.close()


async def collect(engine: NativeEngine, request: Request) -> StepOutput:
    total = StepOutput(())
    async for output in engine.submit(request):
        total = total + output
    return total


async def settle(engine: NativeEngine) -> None:
    """Waits until the engine has nothing to do."""
    for _ in range(200):
        if engine.stats().running == 0 and engine.stats().waiting == 0:
            return
        await asyncio.sleep(0.01)


def test_it_is_an_engine(engine: NativeEngine) -> None:
    assert isinstance(engine, Engine)


def test_callers_that_leave_before_they_are_heard_do_no_harm(engine: NativeEngine) -> None:
    async def run() -> None:
        hold = threading.Event()
        engine._call(lambda: setattr(engine, "_held", hold.wait(30)))  # the step thread is busy
        leaving = [asyncio.create_task(collect(engine, Request(f"gone-{i}", (5, 6), GREEDY))) for i in range(3)]
        await asyncio.sleep(0.05)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        hold.set()
        assert len((await collect(engine, Request("stays", (5, 6), GREEDY))).tokens) == 30
        await settle(engine)

    asyncio.run(run())
    assert engine.alive and engine.invariants() == []


def test_concurrent_answers_equal_lonely_ones(engine: NativeEngine, tiny_model: Path) -> None:
    requests = [Request(str(i), tuple(range(5, 8 + i)), GREEDY) for i in range(12)]

    async def run() -> list[StepOutput]:
        return await asyncio.gather(*(collect(engine, r) for r in requests))

    got = asyncio.run(run())
    core = EngineCore(tiny_model, EngineOptions(max_sequences=1))
    expected = generate(core, requests)
    assert [g.tokens for g in got] == [e.output.tokens for e in expected]
    assert [g.text for g in got] == [e.output.text for e in expected]
    assert engine.invariants() == []


def test_leaving_early_aborts(engine: NativeEngine) -> None:
    async def run() -> None:
        long = Sampling(max_tokens=200, temperature=0.0, ignore_eos=True)
        stream = engine.submit(Request("a", (5, 6), long))
        await anext(stream)
        await stream.aclose()
        await settle(engine)

    asyncio.run(run())
    stats = engine.stats()
    assert (stats.running, stats.aborted_total, stats.finished_total) == (0, 1, 0)
    assert engine.invariants() == []


def test_cancelled_readers_leave_nothing_behind(engine: NativeEngine) -> None:
    async def run() -> None:
        tasks = [asyncio.create_task(collect(engine, Request(str(i), (5, 6), GREEDY))) for i in range(20)]
        await asyncio.sleep(0.02)
        for task in tasks[::2]:
            task.cancel()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(d, StepOutput) for d in done[1::2])
        await settle(engine)

    asyncio.run(run())
    assert engine.stats().running == 0
    assert engine.invariants() == []


def test_a_slow_reader_gets_fewer_larger_messages(engine: NativeEngine) -> None:
    async def run() -> list[StepOutput]:
        messages = []
        async for output in engine.submit(Request("a", (5, 6), GREEDY)):
            messages.append(output)
            await asyncio.sleep(0.05)
        return messages

    messages = asyncio.run(run())
    assert sum(len(m.tokens) for m in messages) == 30
    assert len(messages) < 15


def test_abort_by_id_ends_the_stream(engine: NativeEngine) -> None:
    async def run() -> StepOutput:
        task = asyncio.create_task(collect(engine, Request("a", (5,), Sampling(max_tokens=200, ignore_eos=True))))
        await asyncio.sleep(0.02)
        engine.abort("a")
        engine.abort("unknown")
        return await task

    assert asyncio.run(run()).finish == "abort"


def test_refusals_reach_the_caller(engine: NativeEngine) -> None:
    with pytest.raises(DataError, match="empty"):
        asyncio.run(collect(engine, Request("a", ())))
    assert engine.stats().waiting == 0


def test_weights_are_replaced_between_steps(engine: NativeEngine, tiny_model: Path) -> None:
    async def run() -> StepOutput:
        task = asyncio.create_task(collect(engine, Request("a", (5, 6), GREEDY)))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(engine.update_weights, list(read_tensors(tiny_model)), 3)
        return await task

    output = asyncio.run(run())
    core = EngineCore(tiny_model, EngineOptions(max_sequences=1))
    assert output.tokens == generate(core, [Request("a", (5, 6), GREEDY)])[0].output.tokens
    assert engine.stats().weights == 3
    with pytest.raises(DataError, match="no place"):
        engine.update_weights([("nonsense", next(iter(read_tensors(tiny_model)))[1])], 4)


def test_closing_ends_requests_and_refuses_new_ones(tiny_model: Path) -> None:
    engine = NativeEngine(tiny_model, EngineOptions(max_sequences=2))

    async def run() -> StepOutput:
        task = asyncio.create_task(collect(engine, Request("a", (5,), Sampling(max_tokens=250, ignore_eos=True))))
        await asyncio.sleep(0.02)
        engine.close()
        return await task

    assert asyncio.run(run()).finish == "abort"
    with pytest.raises(EngineStopped, match="closed"):
        asyncio.run(collect(engine, Request("b", (5,))))
    assert not engine.alive


def test_light_parts_import_no_torch() -> None:
    pytest.importorskip("ray", reason="the engine itself runs without Ray")
    code = "import sys, modelyard.engine.request, modelyard.engine.tokenizer, modelyard.serving.app\n"
    code += "heavy = {'torch', 'transformers', 'mlflow'} & set(sys.modules)\nassert not heavy, heavy"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
