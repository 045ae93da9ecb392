"""One deployed application over HTTPS: no replica, one, two and none again by its load; answers that come later."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest
from asking import ENDLESS, MINUTES, SECRET, wait_for
from asking import SHORT as CHAT
from certificates import Authority
from listener import Listener

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, ServerHandle, launch
from modelyard.serving.options import AsyncOptions
from modelyard.serving.tls import Tls, client_context

BUSY = CHAT | ENDLESS | {"max_tokens": 200}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def opinions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("feedback")


@pytest.fixture(scope="module")
def server(
    tiny_model: Path, authority: Authority, redis_url: str, listener: Listener, opinions: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerHandle]:  # fmt: skip
    from modelyard.stages import session

    session.start(2)
    pair = authority.issue("server")
    secret = tmp_path_factory.mktemp("secret") / "secret"
    secret.write_text(SECRET + "\n")
    options = ServeOptions(
        port=0,
        autoscaling=Autoscaling(min_replicas=0, max_replicas=2, upscale_delay_s=1, downscale_delay_s=2),
        engine=EngineOptions(max_sequences=2, max_waiting=64, threads=1),
        tls=Tls(certificate=str(pair.certificate), key=str(pair.key)),
        asynchronous=AsyncOptions(redis_url=redis_url, webhooks=(listener.url,), webhook_secret=str(secret)),
        feedback=str(opinions),
    )
    handle = launch(str(tiny_model), "tiny", options, version="1")
    yield handle
    handle.shutdown()


@pytest.fixture
def http(server: ServerHandle, authority: Authority) -> Iterator[httpx.Client]:
    trusted = client_context(str(authority.certificate), hostname=True)
    with httpx.Client(base_url=server.url, verify=trusted, timeout=MINUTES) as client:
        yield client


def replicas() -> int:
    """Engine replicas that run, as Serve says: asking them would count as load."""
    from ray import serve

    states = serve.status().applications["modelyard"].deployments["engine-1"].replica_states
    return int(sum(count for state, count in states.items() if str(state).endswith("RUNNING")))


def until(goal: int, http: httpx.Client, seconds: float = MINUTES) -> list[int]:
    """The replica counts seen until there are `goal`, while somebody reads the metrics as Prometheus does."""
    seen, deadline = [replicas()], time.monotonic() + seconds
    while seen[-1] != goal and time.monotonic() < deadline:
        assert http.get("/metrics").status_code == 200
        time.sleep(0.5)
        if (now := replicas()) != seen[-1]:
            seen.append(now)
    return seen


def test_the_first_request_waits_for_the_first_replica(server: ServerHandle, http: httpx.Client) -> None:
    assert server.url.startswith("https://") and replicas() == 0
    answer = http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 8
    assert replicas() == 1
    assert httpx.get(server.url + "/healthz", verify=server.verify).status_code == 200
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", http_client=http, max_retries=0) as client:
        pieces = list(client.chat.completions.create(**CHAT, stream=True))
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == answer.json()["choices"][0]["message"]["content"]


def test_strangers_and_plain_http_get_nothing(server: ServerHandle, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other")
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(server.url + "/healthz", verify=client_context(str(other.certificate)))
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/healthz")


def test_answers_come_later_and_webhooks_tell(http: httpx.Client, listener: Listener) -> None:
    now = http.post("/v1/chat/completions", json=CHAT).json()
    hook = {"x-webhook": listener.url + "/told"}
    tasks = [http.post("/v1/async/chat/completions", json=CHAT, headers=hook) for _ in range(3)]
    assert {task.status_code for task in tasks} == {202}
    names = {task.json()["id"] for task in tasks}

    def ended() -> list[dict[str, Any]] | None:
        polled = [http.get(f"/v1/async/{name}").json() for name in names]
        return polled if all(task["status"] == "completed" for task in polled) else None

    assert {t["response"]["choices"][0]["message"]["content"] for t in wait_for(ended, "three answers", 0.1)} == {
        now["choices"][0]["message"]["content"]
    }
    checker, told = openai.OpenAI(api_key="none", webhook_secret=SECRET), set[str]()

    def all_told() -> bool:
        for headers, body in list(listener.got):
            checker.webhooks.verify_signature(body, headers)
            told.add(json.loads(body)["data"]["id"])
        return told == names

    wait_for(all_told, "the first delivery was turned away, and comes again", 0.1)


def test_load_brings_a_second_replica_and_idleness_takes_both(server: ServerHandle, http: httpx.Client) -> None:
    done = threading.Event()

    def ask(_: int) -> set[int]:
        codes = set()
        while not done.is_set():
            codes.add(http.post("/v1/chat/completions", json=BUSY).status_code)
        return codes

    with ThreadPoolExecutor(6) as pool:
        asking = [pool.submit(ask, n) for n in range(6)]
        try:
            up = until(2, http)
        finally:
            done.set()
        codes = set.union(*(future.result() for future in asking))
    assert up[-1] == 2, f"six callers of a replica with two slots brought {up}"
    down = until(0, http)
    assert down[-1] == 0, f"nobody asked, and the replicas were {down}"
    assert codes == {200}


def test_what_people_said_is_parquet_when_the_server_has_stopped(
    server: ServerHandle, http: httpx.Client, opinions: Path
) -> None:
    """Runs last: it stops the server."""
    body = {"id": "x", "rating": "up", "messages": CHAT["messages"], "answer": "hi"}
    assert http.post("/v1/feedback", json=body).status_code == 200
    assert [path.suffix for path in (opinions / "log").iterdir()] == [".jsonl"]
    server.shutdown()
    assert not list((opinions / "log").iterdir())
    (file,) = (opinions / "opinions").iterdir()
    assert pq.read_table(file).to_pylist()[0]["completion"] == "hi"
