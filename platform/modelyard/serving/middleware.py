"""What happens to every request before the application sees it: its name, key, body limits, counting, errors.

A wrapped `send` hands on what the one below returns instead of awaiting it: a streamed chunk passes all of them.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Awaitable, Mapping

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelyard.serving.errors import ApiError, refuse
from modelyard.serving.keys import holder
from modelyard.serving.metrics import Metrics

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/healthz"})
ENDPOINTS = OPEN_PATHS | {
    "/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/feedback", "/v1/models", "/metrics",
    "/v1/async",
}  # fmt: skip
BODY_SECONDS = 30.0
REQUEST_ID = b"x-request-id"
_PLAIN = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""What a client may call its request: it goes to the log."""


def holder_of(request: Request) -> str:
    """Name of the API key's holder, as `Gate` found it; empty when no key is asked for."""
    return str(getattr(request.state, "key", ""))


class RequestId:
    """Gives every request a name, which its answer carries: the client's own `x-request-id` if it is a plain one.

    Serve does the same in its Python proxy and, behind HAProxy, in the ingress; this is for where it does not.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = next((value for key, value in scope["headers"] if key == REQUEST_ID), b"")
        name = given if _PLAIN.fullmatch(given) else uuid.uuid4().hex.encode()
        mine = (REQUEST_ID, name)

        def named(message: Message) -> Awaitable[None]:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], mine]}
            return send(message)

        others = (pair for pair in scope["headers"] if pair[0] != REQUEST_ID)
        await self._app({**scope, "headers": [*others, mine]}, receive, named)


class Gate:
    """Checks the API key, reads the body within its limits, counts the answer by endpoint and status.

    The whole body is read here (it is small by then), so that neither a missing Content-Length nor a slow
    sender gets further.
    """

    def __init__(self, app: ASGIApp, *, keys: Mapping[str, str] | None, max_body: int, metrics: Metrics) -> None:
        self._app, self._keys, self._max_body, self._metrics = app, keys, max_body, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0

        def counted(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            return send(message)

        try:
            await self._answer(scope, receive, counted)
        except ApiError as error:
            await self._refuse(error, counted)
        except Exception as error:
            # Where and what kind, never the message: it may quote the prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            name = next((value.decode("latin-1") for key, value in scope["headers"] if key == REQUEST_ID), "none")
            log.error("a request failed with %s (x-request-id %s)\n%s", type(error).__name__, name, frames)
            if status == 0:
                await self._refuse(ApiError(500, "internal error", kind="server_error"), counted)
        finally:
            endpoint = "/v1/async" if scope["path"].startswith("/v1/async/") else scope["path"]
            endpoint = endpoint if endpoint in ENDPOINTS else "other"
            self._metrics.requests.labels(endpoint, str(status or 499)).inc()
            self._metrics.seconds.labels(endpoint).observe(time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        if self._keys is not None and scope["path"] not in OPEN_PATHS:
            name = holder(self._keys, headers.get("authorization", ""))
            if name is None:
                raise ApiError(401, "a valid API key is needed", kind="authentication_error", code="invalid_api_key")
            scope.setdefault("state", {})["key"] = name
        body = await self._body(headers, receive) if scope["method"] in ("POST", "PUT", "PATCH") else b""
        replayed = False

        async def replay() -> Message:
            nonlocal replayed
            if replayed:
                return await receive()
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        limit = ApiError(413, f"the body is larger than {self._max_body:,} bytes", code="body_too_large")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self._max_body:
            raise limit
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the client went away before the body was complete")
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > self._max_body:
                        raise limit
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:.0f} s", code="timeout") from None
        return b"".join(parts)

    async def _refuse(self, error: ApiError, send: Send) -> None:
        self._metrics.errors.labels(error.code or error.kind).inc()
        await refuse(error, send)
