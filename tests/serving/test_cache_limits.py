"""Response cache and limits a key: alone, behind HTTP, and with Debian's redis-server."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import CHAT, HTTP, MINUTES
from local import LocalServer

from modelyard.engine import EngineOptions, Request, Sampling
from modelyard.engine.request import StepOutput, TokenLogprob
from modelyard.errors import ResourceError
from modelyard.serving.cache import MemoryCache, RedisCache, cache_key, deterministic, dump, parse
from modelyard.serving.errors import ApiError
from modelyard.serving.keys import digest
from modelyard.serving.limits import Limiter
from modelyard.serving.options import Limit, Limits

KEYS = {"alice-key": "alice", "bob-key": "bob"}


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[LocalServer]:
    server = LocalServer(
        tiny_model, EngineOptions(max_sequences=2, threads=1), keys={digest(k): v for k, v in KEYS.items()},
        cache=MemoryCache(100_000, 60), limiter=Limiter(Limits(keys={"bob": Limit(requests_per_minute=3)})),
        version="7",
    )  # fmt: skip
    yield server
    server.stop()


def ask(server: LocalServer, key: str = "alice-key", path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
    given = body.pop("json", CHAT | {"max_tokens": 8} | body)
    return HTTP.post(server.url + path, json=given, headers={"authorization": f"Bearer {key}"})


def steps(server: LocalServer) -> int:
    return server.engine.stats().output_tokens_total


def test_equal_greedy_requests_are_computed_once(served: LocalServer) -> None:
    first = ask(served, temperature=0).json()
    before = steps(served)
    again = ask(served, temperature=0)
    assert again.headers["x-modelyard-version"] == "7"
    assert again.json()["choices"] == first["choices"] and again.json()["usage"] == first["usage"]
    assert again.json()["id"] != first["id"]
    streamed = ask(served, temperature=0, stream=True).text
    events = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    text = "".join(e["choices"][0]["delta"].get("content", "") for e in events)
    assert text == first["choices"][0]["message"]["content"]
    assert steps(served) == before
    # A seed is a promise too; another holder, another length, or chance are not the same request.
    ask(served, temperature=1, seed=5)
    before = steps(served)
    ask(served, temperature=1, seed=5)
    assert steps(served) == before
    for key, change in (("bob-key", {"temperature": 0}), ("alice-key", {"temperature": 0, "max_tokens": 7}),
                        ("alice-key", {"temperature": 1})):  # fmt: skip
        before = steps(served)
        assert ask(served, key, **change).status_code == 200
        assert steps(served) > before, change
    text = HTTP.get(served.url + "/metrics", headers={"authorization": "Bearer alice-key"}).text
    assert 'modelyard_response_cache_total{result="hit"} 3.0' in text


def test_a_key_that_asks_too_much_waits(served: LocalServer) -> None:
    answers = [ask(served, "bob-key", max_tokens=1) for _ in range(4)]
    refused = [a for a in answers if a.status_code == 429]
    assert refused and refused[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused[-1].headers["retry-after"]) <= 20
    assert ask(served, max_tokens=1).status_code == 200


def test_only_equal_requests_have_equal_keys() -> None:
    def key(model: str = "m@1", scope: str = "a", id: str = "1", **sampling: Any) -> str:
        return cache_key(model, scope, Request(id, (1, 2, 3), Sampling(**{"temperature": 0.0} | sampling)))

    assert key() == key(id="2") == key(seed=9) == key(logit_bias={})
    different = [key(), key("m@2"), key(scope="b"), key(max_tokens=7), key(temperature=1.0, seed=1),
                 key(temperature=1.0, seed=2), key(stop=("x",)), key(logit_bias={5: 1.0}), key(logprobs=2)]  # fmt: skip
    assert len(set(different)) == len(different)
    assert not deterministic(Request("1", (1,), Sampling(temperature=0.5)))
    output = StepOutput((5, 6), "é", (TokenLogprob(5, -0.5, ((5, -0.5), (7, -1.5))),), "length", 3)
    assert parse(dump(output)) == output
    assert parse(b"junk") is None and parse(b"[1]") is None


def test_the_memory_cache_is_bounded_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("modelyard.serving.cache.time.monotonic", lambda: now)

    async def use() -> None:
        nonlocal now
        cache = MemoryCache(100, ttl=10)
        for name in "abc":
            await cache.put(name, b"x" * 40)
        assert cache.bytes <= 100 and await cache.get("a") is None
        assert await cache.get("b") and await cache.get("c")
        await cache.get("b")
        await cache.put("d", b"y" * 40)
        assert await cache.get("c") is None and await cache.get("b")
        await cache.put("huge", b"z" * 1000)
        assert await cache.get("huge") is None
        now = 11.0
        assert await cache.get("b") is None and await cache.get("d") is None and cache.bytes == 0

    asyncio.run(use())


def test_buckets_fill_steadily() -> None:
    now = 0.0
    limiter = Limiter(Limits(requests_per_minute=2, tokens_per_minute=60), clock=lambda: now)
    limiter.admit("a", 10)
    limiter.used("a", 100)  # an answer may overdraw; the next request waits for it
    with pytest.raises(ApiError) as error:
        limiter.admit("a", 10)
    assert error.value.retry_after == 60 and "tokens" in error.value.message
    limiter.admit("b", 10)
    now = 61.0
    limiter.admit("a", 10)
    limiter.admit("a", 1)
    with pytest.raises(ApiError, match="requests") as error:
        limiter.admit("a", 1)
    assert error.value.retry_after is not None and error.value.retry_after <= 30
    # A prompt larger than a minute's tokens is let through when the bucket is full, or it would wait for ever.
    Limiter(Limits(tokens_per_minute=10)).admit("c", 1000)


@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_redis_keeps_answers_and_its_absence_costs_nothing(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )

    async def use() -> None:
        cache, other = (RedisCache(f"redis://127.0.0.1:{port}/0", ttl=30) for _ in range(2))
        deadline = time.monotonic() + MINUTES
        while await cache.get("k") is None and time.monotonic() < deadline:
            cache._away_until = 0.0  # it may still be starting
            await cache.put("k", b"answer")
        assert await other.get("k") == b"answer"
        short = RedisCache(f"redis://127.0.0.1:{port}/0", ttl=0.05)
        await short.put("s", b"1")
        await asyncio.sleep(0.2)
        assert await other.get("s") is None
        server.terminate()
        server.wait()
        assert await cache.get("k") is None
        began = time.monotonic()
        for _ in range(50):  # known to be away: not asked again for a while
            assert await cache.get("k") is None
        assert time.monotonic() - began < 5

    try:
        asyncio.run(use())
    finally:
        server.kill()
        server.wait()


def test_a_bad_redis_url_is_said_at_once() -> None:
    with pytest.raises(ResourceError, match="Redis URL"):
        RedisCache("http://nowhere", 1)
