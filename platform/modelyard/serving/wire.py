"""What the requests of one caller gain in a step, as one message: a message costs far more than an output.

A caller asks a replica for a request by a call of its own through Serve, which is the request's place in the replica's
queue and brings its errors. The outputs come over a wire: one TCP connection from the caller to that replica, on which
a line of JSON carries what a step brought for all of the caller's requests. (Serve's own streams go through gRPC: a
thread that polls in each process and five generators a message.) `Sender` is the replica's end of a wire, `Receiver`
the caller's of all of its wires. A wire is never needed: without one, outputs come through the request's own call.

A replica tells where it listens, and two secrets, only in its answer to a call: who connects says one, and is told the
other. A line is data and nothing else, whoever may have written it.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import json
import logging
import secrets
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from typing import Any, cast

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.request import StepOutput, TokenLogprob

log = logging.getLogger(__name__)

HELLO_SECONDS = 10.0
"""How long a connection may take until both ends have said their secrets."""
RETRY_SECONDS = 30.0
"""Until a replica that cannot be reached is tried again."""
HELLO_BYTES = 1024
"""More than a caller's first line ever has."""

_fields = attrgetter(*(f.name for f in fields(StepOutput)))
# Made once: json.dumps with options makes an encoder a call.
_encode = json.JSONEncoder(
    separators=(",", ":"), check_circular=False, default=attrgetter("token", "logprob", "top")
).encode


def pack(output: StepOutput) -> tuple[Any, ...]:
    """An output's fields, for `line`."""
    return _fields(output)


def line(value: Any) -> bytes:
    """A value as a line of JSON: packed outputs, and whatever JSON knows."""
    return _encode(value).encode() + b"\n"


def unpack(values: list[Any]) -> StepOutput:
    """An output from what JSON made of its packed fields. Raises ValueError or TypeError for anything else."""
    tokens, text, logprobs, finish, weights, waited, error, first, prompt, embedding, cached = values
    return StepOutput(
        tuple(tokens), text, _entries(logprobs), finish, weights, waited, error, first, _entries(prompt),
        tuple(embedding), cached,
    )  # fmt: skip


def _entries(values: list[Any]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(t, p, tuple((a, b) for a, b in top)) for t, p, top in values) if values else ()


class WireLost(Exception):
    """The wire ended while the answer was on it."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica listens for wires.

    Attributes:
        replica: its name.
        host: its node's address.
        port: TCP port.
        asked: what a caller has to say.
        answered: what the replica says then.
    """

    replica: str
    host: str
    port: int
    asked: str
    answered: str


class Exchange:
    """A replica's ends of its wires. Belongs to one event loop."""

    def __init__(self) -> None:
        self._senders: dict[str, Sender] = {}
        self._server: asyncio.Server | None = None

    async def open(self, replica: str, host: str) -> Address:
        """Listens on a free port of an address of this machine; says where. Raises OSError when it cannot."""
        asked, answered = secrets.token_hex(32), secrets.token_hex(32)
        make = partial(Sender, self._senders, asked, answered)
        self._server = await asyncio.get_running_loop().create_server(make, host, 0)
        return Address(replica, host, self._server.sockets[0].getsockname()[1], asked, answered)

    def to(self, caller: str) -> Sender | None:
        """The wire to a caller, if there is one."""
        return self._senders.get(caller)

    def close(self) -> None:
        """Takes no more wires and ends those there are."""
        if self._server is not None:
            self._server.close()
        for sender in list(self._senders.values()):
            sender.close()


class Sender(asyncio.Protocol):
    """The replica's end of one wire: outputs of an iteration of the event loop, and so of a step, go as one line.

    While the connection is full they are kept, and then go as one.

    Args:
        senders: where it is found under its caller's name once that one has said who it is.
        asked, answered: as of `Address`.
    """

    def __init__(self, senders: dict[str, Sender], asked: str, answered: str) -> None:
        self._senders, self._asked, self._answered = senders, asked, answered
        self._loop = asyncio.get_running_loop()
        self._heard, self._caller = b"", ""
        self._parts: list[tuple[int, tuple[Any, ...]]] = []
        self._carried: dict[int, Mailbox] = {}
        self._full = self.closed = False

    def put(self, call: int, output: StepOutput, box: Mailbox) -> None:
        """Sends an output of a call; `box`, where the call waits, is told of its end or of the wire's."""
        if self.closed:
            box.fail(WireLost())
            return
        self._carried[call] = box
        if not self._parts:
            self._loop.call_soon(self._send)
        self._parts.append((call, _fields(output)))
        if output.finish is not None:
            del self._carried[call]
            box.put(output)

    def drop(self, call: int) -> None:
        """A call is over, whatever still comes."""
        self._carried.pop(call, None)

    def close(self) -> None:
        """Ends the wire."""
        self._transport.abort()

    def _send(self) -> None:
        if self._parts and not (self._full or self.closed):
            parts, self._parts = self._parts, []
            self._transport.write(line(parts))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none of asyncio's
        self._late = self._loop.call_later(HELLO_SECONDS, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        self._heard += data
        if len(self._heard) > HELLO_BYTES or self._caller:
            self._transport.abort()
        elif self._heard.endswith(b"\n"):
            asked, _, caller = self._heard[:-1].decode("ascii", "replace").partition(" ")
            if not (caller and hmac.compare_digest(asked.encode(), self._asked.encode())):
                self._transport.abort()
                return
            self._late.cancel()
            self._caller, self._senders[caller] = caller, self
            self._transport.write(line(self._answered))

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._late.cancel()
        if self._senders.get(self._caller) is self:
            del self._senders[self._caller]
        for box in self._carried.values():
            box.fail(WireLost())


class Receiver:
    """The caller's ends of its wires to all replicas, and who waits for what. Belongs to one event loop.

    A call has a number of its own, because a request may be asked for again while the wire of a replica that died
    still holds what it had said. Serve itself asks another replica when one dies before Serve has heard that it took
    the call, though its outputs may be here: a call belongs to the replica whose output came first.

    Args:
        caller: its name, without spaces.
    """

    def __init__(self, caller: str) -> None:
        self._caller = caller
        self.boxes: dict[int, Mailbox] = {}
        self._sources: dict[int, str] = {}
        self._wires: dict[str, asyncio.Task[None]] = {}
        self._numbers = itertools.count(1)

    def expect(self) -> tuple[int, Mailbox]:
        """The number of a new call, and where its outputs will be."""
        call, box = next(self._numbers), Mailbox()
        self.boxes[call] = box
        return call, box

    def forget(self, call: int) -> None:
        """A call is over."""
        self.boxes.pop(call, None)
        self._sources.pop(call, None)

    def claim(self, call: int, replica: str) -> bool:
        """Whether a call's output may come from `replica`: from then on it may come from no other."""
        return self._sources.setdefault(call, replica) == replica

    def elsewhere(self, call: int, replica: str) -> bool:
        """Whether another replica's output has come."""
        return self._sources.get(call, replica) != replica

    def connect(self, address: Address) -> None:
        """Opens a wire to a replica unless there is one."""
        if address.replica not in self._wires:
            task = self._wires[address.replica] = asyncio.create_task(self._hold(address))
            task.add_done_callback(lambda _: self._wires.pop(address.replica, None))

    async def _hold(self, address: Address) -> None:
        """Opens a wire and returns when it has ended: the requests' own calls say what that means for them."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                make = partial(_Reader, self, address.replica, address.answered, ended)
                transport, _ = await loop.create_connection(make, address.host, address.port)
        except OSError as error:  # TimeoutError is one
            log.warning("no wire to replica %s at %s:%d (%s): its outputs come one by one", address.replica,
                        address.host, address.port, type(error).__name__)  # fmt: skip
            await asyncio.sleep(RETRY_SECONDS)
            return
        try:
            transport.write(f"{address.asked} {self._caller}\n".encode())
            await ended.wait()
            log.info("the wire to replica %s ended", address.replica)
        finally:
            transport.abort()


class _Reader(asyncio.Protocol):
    """The caller's end of one wire.

    Args:
        receiver: has the boxes where outputs go, by call; those nobody waits for are dropped.
        replica: name of the other end.
        answered: what the other end says first if it is the replica.
        ended: told of the end.
    """

    def __init__(self, receiver: Receiver, replica: str, answered: str, ended: asyncio.Event) -> None:
        self._receiver, self._replica, self._answered, self._ended = receiver, replica, line(answered), ended
        self._known, self._rest = False, b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for found in whole:
            if self._known:
                self._take(found)
            elif hmac.compare_digest(found + b"\n", self._answered):
                self._known = True
            else:
                self._ended.set()
                return

    def _take(self, found: bytes) -> None:
        for call, values in json.loads(found):
            box = self._receiver.boxes.get(call)
            if box is None:
                continue
            if self._receiver.claim(call, self._replica):
                box.put(unpack(values))
            else:  # the whole answer again, from its beginning
                box.fail(WireLost())

    def connection_lost(self, error: Exception | None) -> None:
        self._ended.set()
