"""Scale to zero, lost replicas, a refusing engine, on a real Ray Serve."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import CHAT, ENDLESS, HTTP, replica_processes, until_refused

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, ServerHandle, launch

BODY: dict[str, Any] = CHAT | ENDLESS | {"max_tokens": 240, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[ServerHandle]:
    from modelyard.stages import session

    session.start(2)
    options = ServeOptions(
        port=0,
        autoscaling=Autoscaling(min_replicas=0, max_replicas=1),
        engine=EngineOptions(max_sequences=2, max_waiting=0, threads=1),
    )
    handle = launch(str(tiny_model), "tiny", options)
    yield handle
    handle.shutdown()


def ask(server: ServerHandle, **change: Any) -> httpx.Response:
    return HTTP.post(server.url + "/v1/chat/completions", json=BODY | change)


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    content: str = response.json()["choices"][0]["message"]["content"]
    return content


def kill_replicas() -> int:
    """Kills the engine replicas of this test's Ray; how many there were."""
    mine = replica_processes()
    for process in mine:
        process.kill()
    return len(mine)


def test_the_first_request_wakes_a_model_scaled_to_zero(server: ServerHandle) -> None:
    assert "modelyard_replicas 0.0" in HTTP.get(server.url + "/metrics").text
    assert text(ask(server, max_tokens=5))
    assert "modelyard_replicas 1.0" in HTTP.get(server.url + "/metrics").text


def test_an_engine_that_refuses_is_429(server: ServerHandle) -> None:
    responses = until_refused(lambda: ask(server), 8)
    assert {r.status_code for r in responses} == {200, 429}
    assert all(r.headers["retry-after"] for r in responses if r.status_code == 429)


def test_a_lost_replica_costs_whole_answers_only_time(server: ServerHandle) -> None:
    good = text(ask(server))
    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(ask, server) for _ in range(2)]
        time.sleep(0.2)
        assert kill_replicas() == 1
        assert [text(p.result()) for p in pending] == [good, good]


def test_a_lost_replica_ends_a_begun_stream_with_an_error_event(server: ServerHandle) -> None:
    text(ask(server, max_tokens=1))
    events = []
    body = BODY | {"stream": True, "max_tokens": 2000}
    with HTTP.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
            if len(events) == 10:
                kill_replicas()
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "unavailable"
    assert text(ask(server, max_tokens=3))
