"""HTTP straight from the ingress' process, where one process on one machine is all there is to reach.

Serve's Python proxy in front of it would cost every streamed chunk a gRPC message and two event loops more.
"""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from modelyard.serving.options import ServeOptions

DRAIN_SECONDS = 20
"""How long answers in progress may take once the listener stops."""
KEEP_ALIVE_SECONDS = 90
"""How long a connection may stay idle: Serve's own value for its proxy."""

HEAD_SECONDS = 30.0
"""How long a request line and its headers may take to arrive."""
HEAD_BYTES = 65_536
"""How large a request line and its headers may be together."""


class BoundedHead(HttpToolsProtocol):
    """Closes a connection whose next request's head is late or large: uvicorn waits for it for ever and keeps it all.

    The body has bounds of its own (`middleware.Gate`), idleness between two requests uvicorn's.
    """

    _late: asyncio.TimerHandle | None = None
    _in_head = _in_body = False
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self._late = self.loop.call_later(HEAD_SECONDS, transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        was_body = self._in_body
        super().data_received(data)
        if not self._in_head:
            return
        if not was_body:  # else some of it, or all but a byte, is the end of a body
            self._head += len(data)
        if self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)
        if self._head > HEAD_BYTES:
            self.transport.close()

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._arrived()
        self._in_body = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def _arrived(self) -> None:
        self._in_head, self._head = False, 0
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Listener:
    """A running uvicorn server in this event loop."""

    def __init__(self, server: uvicorn.Server, task: asyncio.Task[None]) -> None:
        self._server, self._task = server, task

    @classmethod
    async def start(cls, app: ASGIApp, options: ServeOptions) -> Listener:
        """Listens where the options say and returns when it does. Raises OSError when it cannot."""
        files = options.tls.absolute() if options.tls is not None else (None, None)
        config = uvicorn.Config(
            app, http=BoundedHead, ssl_certfile=files[0], ssl_keyfile=files[1], lifespan="off", access_log=False,
            log_config=None, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=DRAIN_SECONDS,
        )  # fmt: skip
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([_bound(options.host, options.port)]))
        while not server.started:
            if task.done():
                task.result()
                raise OSError(f"the server on {options.host}:{options.port} ended as it started")
            await asyncio.sleep(0.01)
        return cls(server, task)

    async def stop(self) -> None:
        """Takes no more requests, and returns when those in progress have ended."""
        self._server.should_exit = True
        await asyncio.wait({self._task}, timeout=0.5)
        while not self._task.done():
            if not self._server.server_state.tasks:
                # Only idle connections are left. Over TLS a client that is not reading never answers our goodbye.
                self._task.cancel()
            await asyncio.wait({self._task}, timeout=0.1)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that another ingress may share: the one that takes over binds while the one before still ends."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    bound.bind((host, port))
    return bound
