"""The ingress' own listener: how long a client may take to say what it wants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from asking import MINUTES
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from modelyard.serving import ServeOptions
from modelyard.serving.listener import Listener
from modelyard.serving.server import free_port

LATE = 0.3
REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
Connect = Callable[[], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


async def slow(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers after longer than a head may take."""
    await asyncio.sleep(2 * LATE)
    await PlainTextResponse("here")(scope, receive, send)


async def refusing(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers before the body is there."""
    await PlainTextResponse("no", 413)(scope, receive, send)


@asynccontextmanager
async def listening(monkeypatch: pytest.MonkeyPatch, app: ASGIApp = slow) -> AsyncIterator[Connect]:
    monkeypatch.setattr("modelyard.serving.listener.HEAD_SECONDS", LATE)
    port = free_port()
    listener = await Listener.start(app, ServeOptions(port=port))
    try:
        yield lambda: asyncio.open_connection("127.0.0.1", port)
    finally:
        await listener.stop()


async def ended(reader: asyncio.StreamReader) -> bytes:
    return await asyncio.wait_for(reader.read(), MINUTES)


def test_a_head_that_is_late_or_large_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def tries() -> None:
        async with listening(monkeypatch) as connect:
            reader, writer = await connect()
            writer.write(REQUEST[:-2])
            begin = time.monotonic()
            assert await ended(reader) == b"" and time.monotonic() - begin >= LATE
            reader, writer = await connect()  # says nothing at all
            assert await ended(reader) == b""
            monkeypatch.setattr("modelyard.serving.listener.HEAD_SECONDS", MINUTES)
            reader, writer = await connect()
            writer.write(REQUEST[:-2] + b"a: " + b"x" * 100_000)
            with suppress(ConnectionResetError):  # closed with bytes unread
                assert await ended(reader) == b""

    asyncio.run(tries())


def test_answers_and_pauses_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk() -> None:
        async with listening(monkeypatch) as connect:
            reader, writer = await connect()
            for _ in range(2):
                writer.write(REQUEST)
                assert (await asyncio.wait_for(reader.readuntil(b"here"), MINUTES)).startswith(b"HTTP/1.1 200")
                await asyncio.sleep(2 * LATE)  # idle between two requests
            writer.write(REQUEST[:9])
            assert await ended(reader) == b""  # a second request has no longer than the first

    asyncio.run(talk())


def test_the_rest_of_a_refused_body_is_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    async def post() -> None:
        async with listening(monkeypatch, refusing) as connect:
            reader, writer = await connect()
            writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 3000000\r\n\r\n")
            assert (await asyncio.wait_for(reader.readuntil(b"no"), MINUTES)).startswith(b"HTTP/1.1 413")
            writer.write(b"x" * 3_000_000)
            await asyncio.wait_for(writer.drain(), MINUTES)
            await asyncio.sleep(2 * LATE)
            writer.write(REQUEST)
            await asyncio.wait_for(reader.readuntil(b"no"), MINUTES)

    asyncio.run(post())
