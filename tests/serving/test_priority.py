"""Who goes first, over HTTP: smaller numbers do, as far as a key allows."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import HTTP, wait_for
from local import LocalServer

from modelyard.engine import EngineOptions
from modelyard.serving.keys import digest
from modelyard.serving.limits import Limiter
from modelyard.serving.options import Limit, Limits

KEYS = {"alice-key": "alice", "bob-key": "bob", "batch-key": "batch"}
LIMITS = Limits(keys={"alice": Limit(priority=-10), "batch": Limit(priority=5)})


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[LocalServer]:
    options = EngineOptions(max_sequences=1, threads=1)
    server = LocalServer(
        tiny_model, options, keys={digest(k): v for k, v in KEYS.items()}, limiter=Limiter(LIMITS)
    )  # fmt: skip
    yield server
    server.stop()


def ask(server: LocalServer, key: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    # Long enough that the order in which answers end is the order in which these threads hear of it.
    fields = {"model": "tiny", "prompt": "hello", "max_tokens": 400, "logit_bias": {"1": -100}}
    if path == "/v1/embeddings":
        fields = {"model": "tiny", "input": "hello"}
    return HTTP.post(server.url + path, json=fields | body, headers={"authorization": f"Bearer {key}"})


def test_urgent_requests_overtake_those_that_wait(served: LocalServer) -> None:
    ended: list[str] = []

    def run(name: str, key: str, **body: Any) -> None:
        assert ask(served, key, **body).status_code == 200
        ended.append(name)

    queue: list[tuple[str, str, dict[str, Any]]] = [
        ("late", "bob-key", {"priority": 7}), ("batch", "batch-key", {}), ("usual", "bob-key", {}),
        ("urgent", "alice-key", {"priority": -10}),
    ]  # fmt: skip
    served.engine.pause()
    with ThreadPoolExecutor(len(queue)) as pool:
        for count, (name, key, body) in enumerate(queue):
            pool.submit(run, name, key, **body)
            wait_for(lambda seen=count: served.engine.stats().waiting > seen, name, every=0.001)
        served.engine.resume()
    assert ended == ["urgent", "usual", "batch", "late"]


def test_a_key_bounds_what_may_be_asked(served: LocalServer) -> None:
    for key, path, wanted, status in [
        ("alice-key", "/v1/completions", -11, 403), ("alice-key", "/v1/completions", -10, 200),
        ("bob-key", "/v1/completions", -1, 403), ("bob-key", "/v1/embeddings", -1, 403),
        ("bob-key", "/v1/embeddings", 3, 200), ("batch-key", "/v1/completions", 4, 403),
        ("bob-key", "/v1/completions", 1001, 400), ("bob-key", "/v1/completions", "first", 400),
    ]:  # fmt: skip
        answer = ask(served, key, path, priority=wanted)
        assert answer.status_code == status, (key, wanted, answer.text)
        if status != 200:
            assert answer.json()["error"]["param"] == "priority"
    assert served.idle()
