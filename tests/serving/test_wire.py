"""Outputs of many requests in one message: both ends of a wire over a real connection, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from asking import MINUTES

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.request import StepOutput, TokenLogprob
from modelyard.serving import wire
from modelyard.serving.replicas import ServeBackend
from modelyard.serving.wire import Address, Exchange, Receiver, Sender, WireLost

Run = Callable[[Coroutine[Any, Any, None]], None]
RICH = StepOutput(
    (7, 8), "é\n😀", (TokenLogprob(7, -0.5, ((7, -0.5), (8, -1.5))),), None, 3, 0.25, "", 2, (), (0.1,), 16
)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Runs to the end in a new event loop: asyncio's, or the one Ray's actors have."""
    runs: Run = pytest.importorskip(request.param).run
    return runs


async def until(done: Callable[[], Any]) -> Any:
    async with asyncio.timeout(MINUTES):
        while not (found := done()):
            await asyncio.sleep(0.005)
    return found


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[Sender, Receiver, Exchange, Address]]:
    """Both ends of a wire from the replica r1 to the caller c1."""
    exchange, receiver = Exchange(), Receiver("c1")
    address = await exchange.open("r1", "127.0.0.1")
    for _ in range(3):  # many requests ask at once
        receiver.connect(address)
    sender = await until(lambda: exchange.to("c1"))
    yield sender, receiver, exchange, address
    exchange.close()
    await until(lambda: not receiver._wires)


def test_a_step_of_many_requests_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[Any] = []
    line = wire.line

    def seen(value: Any) -> bytes:
        lines.append(value)
        return line(value)

    async def use() -> None:
        async with connected() as (sender, receiver, _, _):
            monkeypatch.setattr(wire, "line", seen)
            boxes = dict(receiver.expect() for _ in "abc")
            a, b, _ = boxes
            for call in boxes:
                sender.put(call, RICH, Mailbox())
            assert [await box.get() for box in boxes.values()] == [RICH] * 3
            assert [len(parts) for parts in lines] == [3]
            # What piles up before a reader comes is one output; who is not waited for any more hurts nobody.
            calls = Mailbox()
            receiver.forget(b)
            for text, finish in (("x", None), ("y", "length")):
                sender.put(a, StepOutput((1,), text, finish=finish), calls)
                sender.put(b, StepOutput((1,), text), Mailbox())
            await until(lambda: boxes[a].complete)
            assert (await boxes[a].get()).text == "xy"
            assert (await calls.get()).finish == "length"  # its call knows that it may end

    run(use())


def test_what_a_slow_caller_does_not_take_waits_and_comes_whole(run: Run) -> None:
    async def use() -> None:
        async with connected() as (sender, receiver, _, _):
            call, box = receiver.expect()
            sender._transport.set_write_buffer_limits(high=1000)
            part = replace(RICH, logprobs=(), embedding=(), text="x" * 10_000)
            for _ in range(500):
                sender.put(call, part, Mailbox())
                await asyncio.sleep(0)
            sender.put(call, replace(part, finish="length"), Mailbox())
            await until(lambda: box.complete)
            assert len((await box.get()).text) == 501 * 10_000

    run(use())


def test_a_broken_wire_fails_what_it_carries(run: Run) -> None:
    async def use() -> None:
        async with connected() as (sender, receiver, exchange, address):
            call, other = Mailbox(), Mailbox()
            sender.put(1, RICH, call)
            sender.put(2, RICH, other)
            sender.drop(2)
            for task in receiver._wires.values():
                task.cancel()  # the caller goes
            with pytest.raises(WireLost):
                await call.get()
            assert sender.closed and exchange.to("c1") is None
            sender.put(3, RICH, other)
            with pytest.raises(WireLost):
                await other.get()
            # And opens another.
            await until(lambda: not receiver._wires)
            receiver.connect(address)
            number, box = receiver.expect()
            (await until(lambda: exchange.to("c1"))).put(number, RICH, Mailbox())
            assert await box.get() == RICH

    run(use())


def test_strangers_get_nothing_and_a_stranger_in_a_replicas_place_neither(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HELLO_SECONDS", 0.5)

    async def use() -> None:
        async with connected() as (_, _, exchange, address):
            for hello in (f"{'0' * 64} c2\n", f"{address.asked}\n", f"{address.asked} \n", "x" * 5000, "\n", ""):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                writer.write(hello.encode())
                with suppress(ConnectionError):  # the end of a connection with something left to read
                    assert await reader.read() == b"", hello
                writer.close()
            assert exchange.to("c2") is None and exchange.to("") is None
            other = Receiver("c2")
            other.connect(replace(address, answered="another"))
            await until(lambda: not other._wires)

    run(use())


def test_a_replica_that_cannot_be_reached_is_not_tried_at_once_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "RETRY_SECONDS", 0.1)

    async def use() -> None:
        exchange, receiver = Exchange(), Receiver("c1")
        address = await exchange.open("r1", "127.0.0.1")
        exchange.close()
        receiver.connect(address)
        await asyncio.sleep(0.02)
        assert "r1" in receiver._wires
        await until(lambda: not receiver._wires)

    run(use())


def test_what_a_lost_replica_had_said_does_not_reach_the_next_attempt(run: Run) -> None:
    async def use() -> None:
        async with connected() as (lost, receiver, _, _):
            first, box = receiver.expect()
            lost.put(first, StepOutput((1,), "old"), Mailbox())
            box.fail(WireLost())  # its call has ended, its wire is still to be read
            receiver.forget(first)
            call, again = receiver.expect()
            lost.put(call, StepOutput((2,), "new"), Mailbox())
            assert (await again.get()).text == "new"

    run(use())


@pytest.mark.parametrize("way", ["wire", "its own call", "the first was slow"])
def test_a_call_that_serve_gives_to_another_replica_is_not_answered_twice(run: Run, way: str) -> None:
    """Serve asks another replica when one dies before Serve has heard that it took the call."""

    async def messages(*told: Any) -> AsyncIterator[Any]:
        for message in told:
            yield message

    async def use() -> None:
        async with connected() as (lost, receiver, _, _):
            other = Exchange()
            address = await other.open("r2", "127.0.0.1")
            backend = object.__new__(ServeBackend)
            backend._receiver = receiver
            call, box = receiver.expect()
            begun, again = StepOutput((1,), "begun"), StepOutput((1,), "begun", finish="length")
            if way == "the first was slow":
                await backend._follow(messages(address, begun), call, box)
                lost.put(call, again, Mailbox())
            else:
                lost.put(call, begun, Mailbox())
                await until(lambda: box._merged is not None)
                if way == "wire":
                    receiver.connect(address)
                    (await until(lambda: other.to("c1"))).put(call, again, Mailbox())
                else:
                    await backend._follow(messages(address, again), call, box)
            await until(lambda: box._failure is not None)
            assert (await box.get()).text == "begun"
            with pytest.raises(WireLost):
                await box.get()
            assert not box.complete
            # Of the replica that had begun everything is taken, on a new wire too; and a call that is over is no more.
            receiver.forget(call)
            assert receiver.claim(call, "r2")
            other.close()

    run(use())


def test_a_mailbox_gives_what_came_before_the_error(run: Run) -> None:
    async def use() -> None:
        box = Mailbox()
        box.put(StepOutput((1,), "x"))
        box.fail(WireLost())
        assert (await box.get()).text == "x"
        for _ in range(2):
            with pytest.raises(WireLost):
                await box.get()

    run(use())


def test_a_call_over_before_serve_looked_is_no_lost_replica(run: Run) -> None:
    """Ray Serve 2.60 raises this for a call that ended well without a message: its answer comes over the wire."""

    async def responses(code: str) -> AsyncIterator[str]:
        raise RuntimeError(f"Unexpected error (StatusCode.{code}): .")
        yield ""

    async def use() -> None:
        backend: Any = ServeBackend.__new__(ServeBackend)
        box, lost = Mailbox(), Mailbox()
        box.put(StepOutput((1,), "a"))
        await backend._follow(responses("OK"), 1, box)
        box.put(StepOutput((2,), "b", finish="length"))
        assert (await box.get()).text == "ab" and box.complete
        await backend._follow(responses("UNAVAILABLE"), 1, lost)
        with pytest.raises(RuntimeError, match="UNAVAILABLE"):
            await lost.get()

    run(use())
