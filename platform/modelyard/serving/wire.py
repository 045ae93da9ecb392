"""What the requests of one caller gain in a step, as one message: one gRPC message costs as much as sixteen outputs.

A caller asks a replica for a request by a call of its own, which is the request's place in the replica's queue and
brings its errors. The outputs come over a wire: one long call from the caller to that replica, in which one message
carries what a step brought for all of the caller's requests. `Sender` is the replica's end, `Receiver` the caller's.
A wire ends when it has had nothing to do for a while, so that a replica can drain; it is never needed: without one,
outputs come through the request's own call.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.request import StepOutput

log = logging.getLogger(__name__)

Message = list[tuple[int, tuple[Any, ...]]]
"""Calls and the fields of their outputs: tuples pickle in an eighth of a dataclass' time. Empty = a greeting.

A call has a number of its own, because a request may be asked for again while the wire of a replica that died still
holds what it had said.
"""

IDLE_SECONDS = 2.0
"""A wire without requests ends after this time; a replica that drains waits for it."""

_fields = attrgetter(*(f.name for f in fields(StepOutput)))


class WireLost(Exception):
    """The wire ended while the answer was on it."""


@dataclass(frozen=True, slots=True)
class Dial:
    """Asks for a wire from a caller to one replica and no other."""

    caller: str
    replica: str


class Sender:
    """The replica's end of one wire. Belongs to one event loop."""

    def __init__(self) -> None:
        self._parts: Message = []
        self._ready = asyncio.Event()
        self._carried: dict[int, Mailbox] = {}
        self.closed = False

    def put(self, call: int, output: StepOutput, box: Mailbox) -> None:
        """Sends an output of a call; `box`, where the call waits, is told of its end or of the wire's."""
        if self.closed:
            box.fail(WireLost())
            return
        self._carried[call] = box
        self._parts.append((call, _fields(output)))
        self._ready.set()
        if output.finish is not None:
            del self._carried[call]
            box.put(output)

    def drop(self, call: int) -> None:
        """A call is over, whatever still comes."""
        self._carried.pop(call, None)

    async def messages(self) -> AsyncGenerator[Message, None]:
        """What to send, until the wire has been idle for a while. Closing it early fails what it carries."""
        try:
            yield []
            while await self._more():
                self._ready.clear()
                parts, self._parts = self._parts, []
                yield parts
        finally:
            self.closed = True
            for box in self._carried.values():
                box.fail(WireLost())

    async def _more(self) -> bool:
        """Waits for something to send; False when there is nothing and no request is on the wire."""
        while True:
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await self._ready.wait()
                return True
            except TimeoutError:
                if not self._carried and not self._parts:
                    self.closed = True  # before anything else runs: who comes now gets no answer from this wire
                    return False


class Receiver:
    """The caller's ends of its wires to all replicas, and who waits for what. Belongs to one event loop.

    Args:
        dial: opens a wire to a replica by name and yields its messages, the greeting first.
    """

    def __init__(self, dial: Callable[[str], AsyncIterator[Message]]) -> None:
        self._dial = dial
        self._boxes: dict[int, Mailbox] = {}
        self._wires: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)

    def expect(self) -> tuple[int, Mailbox]:
        """The number of a new call, and where its outputs will be."""
        call, box = next(self._numbers), Mailbox()
        self._boxes[call] = box
        return call, box

    def forget(self, call: int) -> None:
        """A call is over."""
        self._boxes.pop(call, None)

    def connect(self, replica: str) -> None:
        """Opens a wire to a replica unless there is one."""
        if replica not in self._wires:
            task = self._wires[replica] = asyncio.create_task(self._read(replica))
            task.add_done_callback(lambda _: self._wires.pop(replica, None))

    async def _read(self, replica: str) -> None:
        try:
            async for message in self._dial(replica):
                for call, values in message:
                    box = self._boxes.get(call)
                    if box is not None:
                        box.put(StepOutput(*values))
        except Exception as error:  # whatever ends a wire, the requests' own calls say what it means for them
            log.info("the wire to replica %s ended: %s", replica, type(error).__name__)
