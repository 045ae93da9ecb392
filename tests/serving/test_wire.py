"""Outputs of many requests in one message: both ends of a wire, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.request import StepOutput, TokenLogprob
from modelyard.serving import wire
from modelyard.serving.replicas import ServeBackend
from modelyard.serving.wire import Message, Receiver, Sender, WireLost


def connected() -> tuple[Sender, Receiver, list[Message]]:
    """A sender and a receiver with a wire between them, and the messages that went over it."""
    sender, seen = Sender(), list[Message]()

    async def dial(replica: str) -> AsyncIterator[Message]:
        assert replica == "r1"
        async for message in sender.messages():
            seen.append(message)
            yield message

    return sender, Receiver(dial), seen


def test_a_step_of_many_requests_is_one_message() -> None:
    async def use() -> None:
        sender, receiver, seen = connected()
        boxes = dict(receiver.expect() for _ in "abc")
        a, b, _ = boxes
        receiver.connect("r1")
        await asyncio.sleep(0)
        rich = StepOutput((7,), "é", (TokenLogprob(7, -0.5, ((7, -0.5),)),), None, 3, 0.25, "", 2, (), (), 16)
        for call in boxes:
            sender.put(call, rich, Mailbox())
        assert [await box.get() for box in boxes.values()] == [rich] * 3
        assert [len(message) for message in seen] == [0, 3]  # the greeting, and all three
        # What piles up before a reader comes is one output; who is not waited for any more hurts nobody.
        calls = Mailbox()
        receiver.forget(b)
        for text, finish in (("x", None), ("y", "length")):
            sender.put(a, StepOutput((1,), text, finish=finish), calls)
            sender.put(b, StepOutput((1,), text), Mailbox())
        await asyncio.sleep(0.01)
        assert (await boxes[a].get()).text == "xy" and boxes[a].complete
        assert (await calls.get()).finish == "length"  # its call knows that it may end

    asyncio.run(use())


def test_an_idle_wire_ends_and_a_broken_one_fails_what_it_carries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "IDLE_SECONDS", 0.05)

    async def use() -> None:
        sender, receiver, _ = connected()
        receiver.connect("r1")
        await asyncio.sleep(0.02)
        call = Mailbox()
        sender.put(1, StepOutput((1,), "x"), call)
        await asyncio.sleep(0.2)
        assert not sender.closed  # a request is on it, however slow
        sender.drop(1)
        await asyncio.sleep(0.2)
        assert sender.closed
        sender.put(2, StepOutput((1,), "x"), call)
        with pytest.raises(WireLost):
            await call.get()

        other, late = Sender(), Mailbox()
        messages = other.messages()
        await anext(messages)
        other.put(3, StepOutput((1,), "x"), late)
        await anext(messages)
        await messages.aclose()  # the caller is gone
        with pytest.raises(WireLost):
            await late.get()

    asyncio.run(use())


def test_what_a_lost_replica_had_said_does_not_reach_the_next_attempt() -> None:
    async def use() -> None:
        lost, receiver, _ = connected()
        first, box = receiver.expect()
        receiver.connect("r1")
        await asyncio.sleep(0)
        lost.put(first, StepOutput((1,), "old"), Mailbox())
        box.fail(WireLost())  # its call has ended, its wire is still to be read
        receiver.forget(first)
        _, again = receiver.expect()
        await asyncio.sleep(0.01)
        again.put(StepOutput((2,), "new"))
        assert (await again.get()).text == "new"

    asyncio.run(use())


def test_a_mailbox_gives_what_came_before_the_error() -> None:
    async def use() -> None:
        box = Mailbox()
        box.put(StepOutput((1,), "x"))
        box.fail(WireLost())
        assert (await box.get()).text == "x"
        for _ in range(2):
            with pytest.raises(WireLost):
                await box.get()

    asyncio.run(use())


def test_a_call_over_before_serve_looked_is_no_lost_replica() -> None:
    """Ray Serve 2.60 raises this for a call that ended well without a message: its answer comes over the wire."""

    async def responses(code: str) -> AsyncIterator[str]:
        raise RuntimeError(f"Unexpected error (StatusCode.{code}): .")
        yield ""

    async def use() -> None:
        backend: Any = ServeBackend.__new__(ServeBackend)
        box, lost = Mailbox(), Mailbox()
        box.put(StepOutput((1,), "a"))
        await backend._follow(responses("OK"), box)
        box.put(StepOutput((2,), "b", finish="length"))
        assert (await box.get()).text == "ab" and box.complete
        await backend._follow(responses("UNAVAILABLE"), lost)
        with pytest.raises(RuntimeError, match="UNAVAILABLE"):
            await lost.get()

    asyncio.run(use())
