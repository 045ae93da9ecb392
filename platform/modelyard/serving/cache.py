"""Answers given before: exact matches of deterministic requests, in this process or in Redis.

A key is a digest over the model, the caller's scope, the prompt's tokens and the sampling parameters, so nothing
of a prompt can be read from it. Redis that is away or slow is a miss, never an error.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
from collections import OrderedDict
from dataclasses import asdict
from typing import Any, Protocol

from modelyard.engine.request import Request, StepOutput
from modelyard.serving.redis_client import redis_client
from modelyard.serving.wire import line, pack, unpack

log = logging.getLogger(__name__)

REDIS_SECONDS = 0.25
"""Longest wait for Redis: beyond it the engine answers."""
LARGEST = 1 << 20
"""Bytes of the largest answer that is kept."""


def deterministic(request: Request) -> bool:
    """Whether the same request gives the same answer: greedy, or with a seed."""
    return request.task == "generate" and (request.sampling.greedy or request.sampling.seed is not None)


def cache_key(model: str, scope: str, request: Request) -> str:
    """Hex digest that only an equal request of the same scope has."""
    sampling = asdict(request.sampling)
    sampling["logit_bias"] = sorted(sampling["logit_bias"].items())
    if request.sampling.greedy:
        sampling["seed"] = None  # decides nothing
    parts: list[Any] = [model, scope, request.prompt, sampling]
    # Whatever else a request may come to carry (adapter, schema) decides the answer too.
    known = {"id", "prompt", "sampling", "priority", "detokenize"}
    parts.append({k: v for k, v in _fields(request).items() if k not in known})
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in request.__dataclass_fields__}


def dump(output: StepOutput) -> bytes:
    """A whole answer as bytes."""
    return line(pack(output))


def parse(data: bytes) -> StepOutput | None:
    """From :func:`dump`; None for anything else."""
    try:
        return unpack(json.loads(data))
    except (ValueError, TypeError):
        return None


class Cache(Protocol):
    """Keeps answers by key."""

    async def get(self, key: str) -> bytes | None:
        """The answer kept under `key`, if any."""
        ...

    async def put(self, key: str, value: bytes) -> None:
        """Keeps an answer."""
        ...


class MemoryCache:
    """The newest answers up to a number of bytes, each for a time. The least recently used go first.

    Args:
        max_bytes: of all answers and keys together.
        ttl: seconds an answer is kept.
    """

    def __init__(self, max_bytes: int, ttl: float) -> None:
        self._max, self._ttl = max_bytes, ttl
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self.bytes = 0

    async def get(self, key: str) -> bytes | None:
        found = self._kept.get(key)
        if found is None:
            return None
        if found[0] < time.monotonic():
            self._drop(key)
            return None
        self._kept.move_to_end(key)
        return found[1]

    async def put(self, key: str, value: bytes) -> None:
        if key in self._kept:
            self._drop(key)
        size = len(key) + len(value)
        if size > min(self._max, LARGEST):
            return
        while self.bytes + size > self._max:
            self._drop(next(iter(self._kept)))
        self._kept[key] = (time.monotonic() + self._ttl, value)
        self.bytes += size

    def _drop(self, key: str) -> None:
        _, value = self._kept.pop(key)
        self.bytes -= len(key) + len(value)


class RedisCache:
    """Answers in Redis, shared by all ingress processes. Bound its memory there (`maxmemory`, `allkeys-lru`).

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        ttl: seconds an answer is kept.

    Raises:
        ResourceError: the client library is not installed, or the URL is none.
    """

    def __init__(self, url: str, ttl: float) -> None:
        self._client = redis_client(
            url, "cache.redis_url", socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
        )
        self._ttl, self._away_until = ttl, 0.0

    async def get(self, key: str) -> bytes | None:
        found = await self._try(lambda: self._client.get(_PREFIX + key))
        return found if isinstance(found, bytes) else None

    async def put(self, key: str, value: bytes) -> None:
        if len(value) <= LARGEST:
            await self._try(lambda: self._client.set(_PREFIX + key, value, px=int(self._ttl * 1000)))

    async def _try(self, call: Any) -> Any:
        from redis.exceptions import RedisError

        if time.monotonic() < self._away_until:
            return None
        try:
            return await asyncio.wait_for(call(), REDIS_SECONDS)
        except (RedisError, OSError, TimeoutError) as error:
            # Not asked for a while: waiting for it would slow every request down.
            self._away_until = time.monotonic() + 5.0
            log.warning("the response cache is away: %s", type(error).__name__)
            return None


_PREFIX = "modelyard:answer:"
