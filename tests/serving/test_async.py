"""Answers that come later: queue, workers, results and webhooks over a real Redis and an engine in this process."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asking import ENDLESS, HTTP, MINUTES, SECRET, wait_for
from asking import SHORT as CHAT
from listener import Listener
from local import LocalServer

from modelyard.errors import DataError, ResourceError
from modelyard.serving import tasks as tasks_module
from modelyard.serving.background import Background, perform
from modelyard.serving.keys import digest
from modelyard.serving.tasks import Task, TaskStore, Worker, new_task
from modelyard.serving.webhooks import Messenger, allowed, read_secret

LONG = CHAT | ENDLESS | {"max_tokens": 240, "n": 8}
Ask = Callable[..., httpx.Response]


def in_thread(work: Coroutine[Any, Any, None]) -> Callable[[], None]:
    """Runs `work` in a loop of its own until what is returned is called."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(work)
    thread = threading.Thread(target=lambda: loop.run_until_complete(asyncio.gather(task, return_exceptions=True)))
    thread.start()

    def stop() -> None:
        loop.call_soon_threadsafe(task.cancel)
        thread.join()

    return stop


@pytest.fixture(scope="module")
def server(tiny_model: Path, redis_url: str, listener: Listener) -> Iterator[LocalServer]:
    background = Background(TaskStore(redis_url, "tiny", 60, 5), most=3, webhooks=[listener.url + "/hooks"])
    keys = {digest(k): k for k in ("alice", "bob")}
    server = LocalServer(tiny_model, keys=keys, tasks=background)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def ask(server: LocalServer) -> Ask:
    def send(method: str, path: str, body: Any = None, key: str = "alice", **headers: str) -> httpx.Response:
        given = {"authorization": f"Bearer {key}"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return HTTP.request(method, server.url + path, json=body, headers=given)

    return send


@pytest.fixture
def worker(server: LocalServer, redis_url: str, tmp_path: Path) -> Iterator[None]:
    (tmp_path / "secret").write_text(SECRET + "\n")

    async def work() -> None:
        messenger = Messenger(read_secret(tmp_path / "secret"))
        await Worker(
            TaskStore(redis_url, "tiny", 60, 5), lambda task: perform(server.service, task), messenger.tell, 4
        ).run()

    stop = in_thread(work())
    yield
    stop()


def end(ask: Ask, name: str) -> dict[str, Any]:
    """The task once it has ended."""

    def ended() -> dict[str, Any] | None:
        found: dict[str, Any] = ask("GET", f"/v1/async/{name}").json()
        return found if found["status"] in ("completed", "failed", "cancelled") else None

    task: dict[str, Any] = wait_for(ended, f"the end of {name}")
    return task


def test_every_endpoint_answers_later_as_it_would_at_once(ask: Ask, worker: None, server: LocalServer) -> None:
    bodies: dict[str, Any] = {
        "/chat/completions": CHAT,
        "/completions": {"model": "tiny", "prompt": ["The", "A"], "max_tokens": 5, "temperature": 0},
        "/embeddings": {"model": "tiny", "input": "The scheduler", "encoding_format": "base64"},
    }
    for path, body in bodies.items():
        submitted = ask("POST", f"/v1/async{path}", body)
        assert submitted.status_code == 202 and submitted.json()["status"] == "queued"
        task = end(ask, submitted.json()["id"])
        assert task["status"] == "completed" and task["finished_at"] >= task["created_at"]
        now, later = ask("POST", f"/v1{path}", body).json(), task["response"]
        for answer in (now, later):
            answer.pop("id", None), answer.pop("created", None)
        assert later == now
    assert server.idle()


def test_a_webhook_is_signed_and_sent_again(
    ask: Ask, worker: None, listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelyard.serving.webhooks.DELAYS", (0.0, 0.05))
    name = ask("POST", "/v1/async/chat/completions", CHAT, x_webhook=f"{listener.url}/hooks/a").json()["id"]
    assert end(ask, name)["status"] == "completed"
    wait_for(lambda: len(listener.got) > 1, "two deliveries")
    (headers, payload), again = listener.got[0], listener.got[1][1]
    assert payload == again and json.loads(payload)["data"]["id"] == name
    client = openai.OpenAI(api_key="none", webhook_secret=SECRET)
    client.webhooks.verify_signature(payload, headers)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(payload + b" ", headers)
    for other in (listener.url, f"{listener.url}/hooksx", f"{listener.url}/hooks/../x", "http://10.0.0.1/hooks"):
        refused = ask("POST", "/v1/async/chat/completions", CHAT, x_webhook=other)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "webhook", other


def test_only_who_asked_sees_and_cancels(ask: Ask, server: LocalServer, redis_url: str) -> None:
    names = [ask("POST", "/v1/async/chat/completions", LONG).json()["id"] for _ in range(3)]  # nobody works yet
    full = ask("POST", "/v1/async/chat/completions", CHAT)
    assert full.status_code == 429 and "retry-after" in full.headers
    for method, path in (("GET", ""), ("POST", "/cancel")):
        assert ask(method, f"/v1/async/{names[0]}{path}", key="bob").status_code == 404
    assert ask("GET", "/v1/async/task-none").json()["error"]["code"] == "task_not_found"
    assert ask("POST", f"/v1/async/{names[0]}/cancel").json()["status"] == "cancelled"
    before = server.engine.stats().aborted_total

    async def work() -> None:
        async def tell(_: Task) -> None: ...

        await Worker(TaskStore(redis_url, "tiny", 60, 5), lambda task: perform(server.service, task), tell, 1).run()

    stop = in_thread(work())
    try:
        wait_for(lambda: server.engine.stats().running, "a task that runs", every=0.005)
        assert ask("POST", f"/v1/async/{names[1]}/cancel").json()["status"] == "cancelled"
        assert end(ask, names[1])["response"] is None
        assert ask("POST", f"/v1/async/{names[2]}/cancel").status_code == 200
    finally:
        stop()
    assert server.idle() and server.engine.stats().aborted_total > before, "what was cancelled left the engine"


def test_what_cannot_run_is_refused_when_it_is_submitted(ask: Ask, local: LocalServer) -> None:
    for change, status in (({"stream": True}, 400), ({"max_tokens": 0}, 400), ({"model": "other"}, 404),
                           ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400)):  # fmt: skip
        assert ask("POST", "/v1/async/chat/completions", CHAT | change).status_code == status, change
    off = HTTP.post(local.url + "/v1/async/chat/completions", json=CHAT)
    assert off.status_code == 404 and off.json()["error"]["code"] == "async_off"


def test_a_lost_task_goes_to_another_worker_but_not_for_ever(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks_module, "BEAT_SECONDS", 0.1)

    async def use() -> None:
        store = TaskStore(redis_url, "lost", 60, 1.0)
        with pytest.raises(DataError):
            read_secret(Path("/nowhere"))
        for task in (kept := new_task("/v1/completions", "", "{}"), doomed := new_task("/v1/completions", "", "{}")):
            await store.submit(task)
        deadline = time.monotonic() + MINUTES
        while (taken := await store.take("gone", 0.01)) is None:  # the first call makes the group
            assert time.monotonic() < deadline
        assert taken[1] == kept.id  # and its worker is never heard of again

        async def answer(task: Task) -> tuple[str, str]:
            await asyncio.sleep(1.5)  # longer than a lease, which is renewed meanwhile
            return ("completed", "{}") if task.id == kept.id else await asyncio.Future()

        async def tell(_: Task) -> None: ...

        async def work_until(*statuses: str) -> None:
            """A worker that is stopped once the two tasks have these statuses."""
            worker = asyncio.create_task(Worker(TaskStore(redis_url, "lost", 60, 1.0), answer, tell, 2).run())
            deadline = time.monotonic() + MINUTES
            while time.monotonic() < deadline:
                found = [await store.get(task.id) for task in (kept, doomed)]
                if [task.status for task in found if task] == list(statuses):
                    break
                await asyncio.sleep(0.02)
            worker.cancel()
            await asyncio.gather(worker, return_exceptions=True)
            assert [task.status for task in found if task] == list(statuses)

        await work_until("completed", "in_progress")
        deadline = time.monotonic() + MINUTES
        while (await store.get(doomed.id) or doomed).status != "failed" and time.monotonic() < deadline:
            await asyncio.sleep(0.25)  # a lease ends; the next worker that takes the task is lost, too
            if (lost := await store.take("gone", 0.01)) is not None:
                await store.begin(lost[1])
        failed = await store.get(doomed.id)
        assert failed is not None and "workers were lost" in failed.result and failed.body == ""

    asyncio.run(use())


def test_addresses_and_urls() -> None:
    assert allowed("https://a.example/x/y", ["https://a.example/x"]) and allowed(
        "https://a.example/", ["https://a.example"]
    )
    for url in ("http://a.example/x", "https://a.example:444/x", "https://b@a.example/x", "https://a.example.evil/x",
                "https://a.example/xy", "https://a.example/x/../y", "//a.example/x", "https://[bad"):  # fmt: skip
        assert not allowed(url, ["https://a.example/x"]), url
    assert not allowed("https://a.example/", [])
    with pytest.raises(ResourceError, match="Redis URL"):
        TaskStore("http://nowhere", "q", 1, 1)
