"""The application on a real Ray Serve: replicas, disconnects, refusals before work, shutdown."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from asking import CHAT, ENDLESS, HTTP, MESSAGES, replica_processes, until_refused, wait_for

from modelyard.engine import EngineOptions
from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.serving import Autoscaling, ServeOptions, ServerHandle, launch
from modelyard.serving.keys import add_key
from modelyard.serving.rollout import calls
from modelyard.serving.server import check, free_port
from modelyard.serving.traffic import Variant

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import save_model


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerHandle]:
    from modelyard.stages import session

    session.start(2)
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    add_key(keys, "alice")
    options = ServeOptions(
        port=0,
        autoscaling=Autoscaling(min_replicas=1, max_replicas=2),
        engine=EngineOptions(max_sequences=2, max_waiting=64, threads=1),
        max_queued=4,
        api_keys=str(keys),
    )
    handle = launch(str(tiny_model), "tiny", options, version="1")
    yield handle
    handle.shutdown()


@pytest.fixture
def client(server: ServerHandle) -> Iterator[openai.OpenAI]:
    assert server.key is not None
    with openai.OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0) as client:
        yield client


def engine_call(method: str) -> list[Any]:
    """What every engine replica answers."""
    return calls("engine-1", method, "modelyard")


def idle() -> bool:
    """Waits until no replica works; whether all books are in order then."""
    wait_for(lambda: all(s.running == s.waiting == 0 for s in engine_call("stats")), "idle replicas", every=0.1)
    return all(faults == [] for faults in engine_call("invariants"))


def test_the_official_client_works(client: openai.OpenAI) -> None:
    common: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**common)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert client.completions.create(model="tiny", prompt="The", max_tokens=3).choices[0].finish_reason
    assert [m.id for m in client.models.list()] == ["tiny"]


def test_every_answer_carries_its_requests_name(server: ServerHandle) -> None:
    """The ingress listens itself: no proxy of Serve's is there to do it."""
    auth = {"authorization": f"Bearer {server.key}"}
    url = server.url + "/v1/chat/completions"
    short = CHAT | {"max_tokens": 1}
    for body in (short, short | {"stream": True}, {}):
        answer = HTTP.post(url, json=body, headers=auth | {"x-request-id": "mine-1"})
        assert answer.headers.get_list("x-request-id") == ["mine-1"], body
    made = [HTTP.post(url, json=short, headers=auth | {"x-request-id": bad}) for bad in ("", "a b", "x" * 129)]
    made += [HTTP.get(server.url + "/healthz"), HTTP.post(url), HTTP.get(server.url + "/v1/none", headers=auth)]
    assert len({answer.headers["x-request-id"] for answer in made}) == len(made)
    assert all(re.fullmatch("[0-9a-f]{32}", answer.headers["x-request-id"]) for answer in made)
    other = HTTP.post(url, json=short, headers=auth | {"x-modelyard-version": "9"})
    assert other.status_code == 404 and other.headers["x-request-id"]


def test_concurrent_greedy_answers_are_identical(client: openai.OpenAI) -> None:
    def ask(stream: bool) -> str:
        common: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 0}
        if stream:
            chunks = client.chat.completions.create(**common, stream=True)
            return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        return client.chat.completions.create(**common).choices[0].message.content or ""

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(ask, [False, True] * 4))) == 1
    assert idle()


def test_errors_keep_their_shape_through_serve(server: ServerHandle) -> None:
    auth = {"authorization": f"Bearer {server.key}"}
    url = server.url + "/v1/chat/completions"
    cases: list[tuple[int, Any]] = [
        (404, CHAT | {"model": "other"}),
        (400, CHAT | {"max_tokens": 0}),
        (400, CHAT | {"messages": [{"role": "user", "content": "word " * 3000}]}),
    ]
    for status, body in cases:
        response = HTTP.post(url, json=body, headers=auth)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert HTTP.post(url, content=b"{", headers=auth).status_code == 400
    assert HTTP.post(url, content=b"x" * 3_000_000, headers=auth).status_code == 413
    assert HTTP.post(url, json=CHAT).status_code == 401


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_reaches_the_engine(server: ServerHandle, stream: bool) -> None:
    before = sum(s.aborted_total for s in engine_call("stats"))
    body = json.dumps(CHAT | ENDLESS | {"max_tokens": 2000, "stream": stream}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {server.key}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as raw:
        raw.sendall(head.encode() + body)
        wait_for(lambda: any(s.running for s in engine_call("stats")), "an answer in the making", every=0.01)
        if stream:
            raw.recv(100)
    assert idle()
    assert sum(s.aborted_total for s in engine_call("stats")) == before + 1


def test_too_many_requests_are_429_and_the_rest_is_answered(server: ServerHandle) -> None:
    body = CHAT | ENDLESS | {"max_tokens": 120, "temperature": 0}
    headers = {"authorization": f"Bearer {server.key}"}
    url = server.url + "/v1/chat/completions"
    responses = until_refused(lambda: HTTP.post(url, json=body, headers=headers), 32)
    assert {r.status_code for r in responses} == {200, 429}
    assert all("retry-after" in r.headers for r in responses if r.status_code == 429)
    assert len({r.json()["choices"][0]["message"]["content"] for r in responses if r.status_code == 200}) == 1
    assert idle()


def test_metrics_count_replicas(server: ServerHandle) -> None:
    text = HTTP.get(server.url + "/metrics", headers={"authorization": f"Bearer {server.key}"}).text
    assert "modelyard_replicas " in text
    assert 'modelyard_tokens_total{direction="completion",version="1"}' in text


def test_metrics_of_a_replica_that_does_not_answer_are_the_last_known(server: ServerHandle) -> None:
    def page() -> dict[str, float]:
        response = HTTP.get(server.url + "/metrics", headers=server.headers)
        assert response.status_code == 200, response.text
        lines = [line.rpartition(" ") for line in response.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    replicas, missed = 'modelyard_replicas{version="1"}', 'modelyard_engine_stats_missed_total{version="1"}'
    before = page()
    frozen = replica_processes()[0]
    frozen.suspend()
    try:
        during = page()
    finally:
        frozen.resume()
    assert during[missed] == before[missed] + 1 and during[replicas] == before[replicas] > 0
    assert page()[missed] == during[missed]


def test_a_second_server_on_the_same_cluster_is_refused(server: ServerHandle, tiny_model: Path) -> None:
    with pytest.raises(ResourceError, match="already runs"):
        launch(str(tiny_model), "other", ServeOptions(port=0))
    with pytest.raises(ResourceError, match="cannot listen"):
        check(ServeOptions(port=int(server.url.rsplit(":", 1)[1])))


def test_refusals_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="without API keys"):
        launch(str(tiny_model), "m", ServeOptions(host="0.0.0.0"))
    with pytest.raises(RecipeError, match="HAProxy"):
        launch(str(tiny_model), "m", ServeOptions(haproxy=True))
    with pytest.raises(DataError, match="API keys"):
        launch(str(tiny_model), "m", ServeOptions(api_keys=str(tmp_path / "none")))
    with pytest.raises(DataError, match="not a model folder"):
        launch(str(tmp_path), "m", ServeOptions(port=0))
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ResourceError, match="cannot listen") as caught:
            launch(str(tiny_model), "m", ServeOptions(port=busy.getsockname()[1]))
        assert "another port" in caught.value.mend


def test_key_files_with_raw_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text("alice my-secret\n")
    with pytest.raises(DataError) as caught:
        check(ServeOptions(api_keys=str(tmp_path / "keys.txt"), port=free_port()))
    assert "my-secret" not in str(caught.value)
    assert "keys.txt:1" in caught.value.place


def test_another_version_takes_over_without_a_failed_request(
    server: ServerHandle, tiny_model: Path, tmp_path: Path
) -> None:
    """Runs last: from version 1 by a canary to version 2, under load."""
    other = save_model(tmp_path / "other", seed=5)
    body = CHAT | ENDLESS | {"max_tokens": 12, "temperature": 0}
    headers = {"authorization": f"Bearer {server.key}"}
    done = threading.Event()

    seen: dict[bool, set[tuple[int, str, str]]] = {False: set(), True: set()}

    def ask(stream: bool) -> None:
        while not done.is_set():
            session = {"x-session-id": str(len(seen[stream]))} if stream else {}
            answer = HTTP.post(
                server.url + "/v1/chat/completions", json=body | {"stream": stream}, headers=headers | session
            )
            text = answer.text if not stream or '"error"' in answer.text else ""
            text = answer.json()["choices"][0]["message"]["content"] if answer.is_success and not stream else text
            seen[stream].add((answer.status_code, answer.headers.get("x-modelyard-version", ""), text))

    def answered(version: str) -> None:
        wait_for(lambda: all(version in {v for _, v, _ in list(s)} for s in seen.values()), f"version {version}")

    rollout = server.rollout
    assert rollout is not None
    one, two = Variant("1", str(tiny_model)), Variant("2", str(other))
    with ThreadPoolExecutor(2) as pool:
        asking = [pool.submit(ask, stream) for stream in (False, True)]
        try:
            answered("1")
            rollout.move([one, replace(two, share=0.5)])
            named = HTTP.post(
                server.url + "/v1/chat/completions", json=body, headers=headers | {"x-modelyard-version": "2"}
            )
            rollout.move([two])
            answered("2")
        finally:
            done.set()
        for future in asking:
            future.result()
    whole, streamed = seen[False], seen[True]
    assert named.headers["x-modelyard-version"] == "2"
    assert {status for status, _, _ in whole | streamed} == {200}
    assert {text for _, _, text in streamed} == {""}
    answers = {version: {text for _, v, text in whole if v == version} for version in "12"}
    assert [len(texts) for texts in answers.values()] == [1, 1], "a prompt met the engine of another version"
    assert answers["1"] != answers["2"]
    text = HTTP.get(server.url + "/metrics", headers=headers).text
    assert 'modelyard_replicas{version="1"} 0.0' in text
    assert 'modelyard_replicas{version="2"} 1.0' in text
