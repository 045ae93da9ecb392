"""What happens to every request before the application sees it: keys, body limits, counting, last-resort errors."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Mapping

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


def holder_of(request: Request) -> str:
    """Name of the API key's holder, as `Gate` found it; empty when no key is asked for."""
    return str(getattr(request.state, "key", ""))


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

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._answer(scope, receive, counted)
        except ApiError as error:
            await self._refuse(error, counted)
        except Exception as error:
            # Where and what kind, never the message: it may quote the prompt.
            frames = "".join(traceback.format_tb(error.__traceback__))
            log.error("a request failed with %s\n%s", type(error).__name__, frames)
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
