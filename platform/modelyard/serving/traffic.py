"""Which version answers a request: one application a version behind one door, by share, by caller, or by name.

Every version is a whole application (its own tokenizer, template, cache keys, metrics). The door only chooses: it
never reads a body, except to hand a copy of it to a version in the shadow. Knows nothing of Ray.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from modelyard.serving.errors import ApiError, refuse

log = logging.getLogger(__name__)

SPLIT = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})
"""Paths that versions share; all others belong to the stable one."""
MIRRORED = SPLIT - {"/v1/embeddings"}
VERSION = "x-modelyard-version"
SESSION = "x-session-id"
COMPARED = 4_000_000
"""Bytes of an answer that are kept for a comparison; a longer one is not compared."""
COPIES = 32
"""Copies in flight at most; further ones are dropped and counted, so that a slow shadow costs no memory."""


@dataclass(frozen=True)
class Variant:
    """One version of the model and its part of the traffic.

    Attributes:
        version: how answers, metrics and logs name it.
        model: URI of its folder.
        share: share of the requests it answers, from 0 to 1; the first variant, the stable one, takes what is left.
        shadow: sees copies of requests and answers nobody.
    """

    version: str
    model: str
    share: float = 0.0
    shadow: bool = False


@dataclass(frozen=True)
class Route:
    """A variant and the application that answers for it."""

    variant: Variant
    app: ASGIApp


class Door:
    """ASGI middleware that hands each request to one version's application.

    Args:
        app: what answers the protocol's other messages (start and end of the server).
        state: the routes, which change while it runs.
    """

    def __init__(self, app: ASGIApp, state: Traffic) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._state.routes:
            await self._app(scope, receive, send)
            return
        try:
            route = self._state.choose(scope)
        except ApiError as error:
            await refuse(error, send)
            return
        mirror, busy, version = self._state.mirror, self._state.busy, route.variant.version
        busy[version] += 1
        try:
            if mirror is not None and scope["path"] in MIRRORED and mirror.wants():
                await mirror.answer(route, scope, receive, send)
            else:
                await route.app(scope, receive, send)
        finally:
            busy[version] -= 1


class Traffic:
    """The routes of now and the choice among them.

    Args:
        sticky: whether one caller (session header, else API key) is answered by the same version every time.
    """

    def __init__(self, *, sticky: bool = True) -> None:
        self._sticky = sticky
        self.routes: tuple[Route, ...] = ()
        self.mirror: Mirror | None = None
        self.busy: Counter[str] = Counter()
        """Requests in progress by version, those of versions that have left included."""

    def adopt(self, routes: Sequence[Route], mirror: Mirror | None) -> None:
        """New requests follow these routes; those in progress end where they are. The first is the stable one."""
        self.routes, self.mirror = tuple(routes), mirror

    def choose(self, scope: Scope) -> Route:
        """The route of a request. Raises ApiError (404) when it names a version that answers nobody here."""
        stable, *others = self.routes
        if scope["path"] not in SPLIT:
            return stable
        headers = {k: v for k, v in scope["headers"] if k in _CHOOSING}
        named = headers.get(VERSION.encode(), b"").decode("latin-1")
        if named:
            found = next((r for r in self.routes if r.variant.version == named), None)
            if found is None:
                message = f"no version {named[:100]!r} answers here"
                raise ApiError(404, message, param=VERSION, code="version_not_found")
            return found
        if not others:
            return stable
        point = self._point(headers.get(SESSION.encode()) or headers.get(b"authorization"))
        for route in others:
            if point < route.variant.share:
                return route
            point -= route.variant.share
        return stable

    def _point(self, caller: bytes | None) -> float:
        """Where in [0, 1) a request falls; a share that grows keeps the callers it had."""
        if caller is None or not self._sticky:
            return random.random()
        return int.from_bytes(hashlib.sha256(caller).digest()[:8], "big") / 2**64


_CHOOSING = frozenset({VERSION.encode(), SESSION.encode(), b"authorization"})


class Mirror:
    """Asks a version in the shadow what another has just answered, and notes how the answers compare.

    Args:
        route: the version in the shadow.
        share: share of the requests that are copied, from 0 to 1.
        count: told `same`, `different`, `failed` or `dropped` for every copy.
        keep: takes a row for every comparison.
        texts: whether rows hold request and answers; without it they hold only lengths and times.
    """

    def __init__(
        self,
        route: Route,
        share: float,
        *,
        count: Callable[[str], None],
        keep: Callable[[Mapping[str, Any]], None],
        texts: bool = False,
    ) -> None:
        self.route, self._share, self._count, self._keep, self._texts = route, share, count, keep, texts
        self._running: set[asyncio.Task[None]] = set()

    def wants(self) -> bool:
        """Whether the next request is copied."""
        if random.random() >= self._share:
            return False
        if len(self._running) >= COPIES:
            self._count("dropped")
            return False
        return True

    async def answer(self, route: Route, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers through `route`, unchanged; afterwards, in the background, asks the shadow the same."""
        seen, body = _Seen(), bytearray()

        async def reading() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
            return message

        async def writing(message: Message) -> None:
            seen.take(message)
            await send(message)

        await route.app(scope, reading, writing)
        seen.end()
        if seen.status == 200 and seen.whole:
            task = asyncio.create_task(self._compare(route.variant, scope, bytes(body), seen))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _compare(self, stable: Variant, scope: Scope, body: bytes, seen: _Seen) -> None:
        try:
            copy = await _ask(self.route.app, scope, body)
            row = compare(body, seen, copy)
            self._count("failed" if copy.status != 200 else "same" if row["same"] else "different")
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            row = {"id": uuid.uuid4().hex, "time": now, "path": scope["path"], "stable": stable.version,
                   "shadow": self.route.variant.version, **row}  # fmt: skip
            if self._texts:
                row |= {"request": body.decode("utf-8", "replace"), "answer": seen.texts(),
                        "shadow_answer": copy.texts()}  # fmt: skip
            await asyncio.to_thread(self._keep, row)
        except Exception:
            self._count("failed")
            log.exception("a copy for version %s failed", self.route.variant.version)


class _Seen:
    """What an application sent: status, text, seconds."""

    def __init__(self) -> None:
        self.status, self.seconds, self.whole = 0, 0.0, True
        self._streamed, self._parts, self._size, self._started = False, list[bytes](), 0, time.perf_counter()

    def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._streamed = any(k == b"content-type" and b"event-stream" in v for k, v in message["headers"])
            return
        part = message.get("body", b"")
        self._size += len(part)
        self.whole = self._size <= COMPARED
        if self.whole:
            self._parts.append(part)

    def end(self) -> None:
        self.seconds = time.perf_counter() - self._started

    def texts(self) -> list[str]:
        """The text of every choice."""
        return texts(b"".join(self._parts), streamed=self._streamed)


def texts(body: bytes, *, streamed: bool) -> list[str]:
    """The text of every choice of an answer, whole or as server-sent events."""
    lines = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")] if streamed else [body]
    found: dict[int, str] = {}
    for line in lines:
        for choice in json.loads(line).get("choices", ()):
            part = choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + part
    return [found[index] for index in sorted(found)]


def compare(body: bytes, stable: _Seen, shadow: _Seen) -> dict[str, Any]:
    """How two answers to the same request compare, without any of their text.

    `shared` is the number of characters both begin with; `repeatable` says whether the request fixes its answer
    (greedy or seeded): only then does a difference mean anything.
    """
    asked = json.loads(body)
    mine, other = stable.texts(), shadow.texts() if shadow.status == 200 else []
    first, second = "".join(mine), "".join(other)
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return {
        "status": stable.status, "shadow_status": shadow.status, "same": mine == other,
        "repeatable": asked.get("temperature") == 0 or asked.get("seed") is not None,
        "shared": min(len(first), len(second)) if shared is None else shared,
        "characters": len(first), "shadow_characters": len(second),
        "seconds": round(stable.seconds, 4), "shadow_seconds": round(shadow.seconds, 4),
    }  # fmt: skip


async def _ask(app: ASGIApp, scope: Scope, body: bytes) -> _Seen:
    """Calls an application with a copy of a request; nobody listens, nobody goes away."""
    sent, seen = False, _Seen()

    async def receive() -> Message:
        nonlocal sent
        if sent:
            await asyncio.Event().wait()  # until the application has its answer and stops listening
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        seen.take(message)

    await app({**scope, "state": {}}, receive, send)
    seen.end()
    return seen
