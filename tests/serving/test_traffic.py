"""Which version answers, what the shadow is asked, and whose metrics are whose: real applications, no Ray."""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import save_model

from modelyard.engine import EngineOptions, NativeEngine, Tokenizer
from modelyard.monitor.metrics import SHADOW
from modelyard.serving.api import build_app
from modelyard.serving.backend import LocalBackend
from modelyard.serving.errors import ApiError
from modelyard.serving.metrics import Exposition, Metrics
from modelyard.serving.service import Service
from modelyard.serving.traffic import Door, Mirror, Route, Traffic, Variant, texts

BODY: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 6, "temperature": 0, "logit_bias": {"1": -100}}


async def nobody(*_: object) -> None:
    """An application that is never called."""


def traffic(**shares: float) -> Traffic:
    found = Traffic()
    found.adopt([Route(Variant(name, "", share), nobody) for name, share in shares.items()], None)
    return found


def scope(path: str = "/v1/completions", **headers: str) -> dict[str, Any]:
    return {"path": path, "headers": [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]}


def test_shares_hold_and_a_caller_stays_while_they_grow() -> None:
    small, large = traffic(one=0.0, two=0.2), traffic(one=0.0, two=0.5)
    callers = [scope(x_session_id=str(i)) for i in range(2000)]
    first = [small.choose(caller).variant.version for caller in callers]
    assert 0.15 < first.count("two") / len(first) < 0.25
    assert first == [small.choose(caller).variant.version for caller in callers]
    later = [large.choose(caller).variant.version for caller in callers]
    assert all(after == "two" for before, after in zip(first, later, strict=True) if before == "two")
    anonymous = Counter(small.choose(scope()).variant.version for _ in range(2000))
    assert 0.15 < anonymous["two"] / 2000 < 0.25


def test_requests_are_counted_until_their_answer_is_sent_also_of_versions_that_left() -> None:
    async def run() -> None:
        state, sent, failing = Traffic(), asyncio.Event(), False

        async def slow(*_: object) -> None:
            await sent.wait()
            if failing:
                raise RuntimeError

        state.adopt([Route(Variant("one", ""), slow)], None)
        asked = asyncio.create_task(Door(nobody, state)({"type": "http", **scope()}, nobody, nobody))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        state.adopt([Route(Variant("two", ""), slow)], None)
        assert (state.busy["one"], state.busy["two"]) == (1, 0)
        failing = True
        sent.set()
        with pytest.raises(RuntimeError):
            await asked
        assert state.busy["one"] == 0

    asyncio.run(run())


def test_a_named_version_answers_and_other_paths_belong_to_the_stable_one() -> None:
    routes = traffic(one=0.0, two=0.01)
    assert routes.choose(scope(x_modelyard_version="two")).variant.version == "two"
    assert {routes.choose(scope("/v1/models")).variant.version for _ in range(300)} == {"one"}
    with pytest.raises(ApiError) as caught:
        routes.choose(scope(x_modelyard_version="three"))
    assert (caught.value.status, caught.value.code) == (404, "version_not_found")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Path, NativeEngine]]]:
    made = {}
    for version in "12":
        folder = save_model(tmp_path_factory.mktemp("version") / version, seed=int(version))
        made[version] = folder, NativeEngine(folder, EngineOptions(max_sequences=4, threads=1))
    yield made
    for _, engine in made.values():
        engine.close()


def application(engines: dict[str, tuple[Path, NativeEngine]], version: str, metrics: Metrics) -> FastAPI:
    folder, engine = engines[version]
    service = Service(
        "tiny", Tokenizer(folder), LocalBackend(engine), max_length=engine.max_length, max_choices=2, timeout=60,
        metrics=metrics, version=version,
    )  # fmt: skip
    return build_app(service, keys=None, max_body=10_000)


def test_the_shadow_is_asked_the_same_and_answers_nobody(engines: dict[str, tuple[Path, NativeEngine]]) -> None:
    page, metrics, copies = Exposition(), Metrics(), Metrics()
    page.add("1", metrics.registry)
    counts = SHADOW.counter(copies.registry)
    page.add("2", copies.registry)
    rows: list[Any] = []
    shadow = Route(Variant("2", "", 1.0, shadow=True), application(engines, "2", Metrics()))
    mirror = Mirror(shadow, 1.0, count=lambda result: counts.labels(result).inc(), keep=rows.append)
    state = Traffic()
    state.adopt([Route(Variant("1", ""), application(engines, "1", metrics))], mirror)
    app = FastAPI()
    app.add_middleware(Door, state=state)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client:
            answers = [
                await client.post("/v1/completions", json=BODY),
                await client.post("/v1/completions", json=BODY | {"stream": True, "temperature": 1}),
                await client.post("/v1/completions", json=BODY | {"max_tokens": 0}),
            ]
            while len(rows) < 2:
                await asyncio.sleep(0.01)
            return answers

    whole, streamed, refused = asyncio.run(ask())
    assert [r.status_code for r in (whole, streamed, refused)] == [200, 200, 400]
    assert {r.headers["x-modelyard-version"] for r in (whole, streamed)} == {"1"}
    first = next(row for row in rows if row["repeatable"])
    assert (first["stable"], first["shadow"], first["same"], first["shadow_status"]) == ("1", "2", False, 200)
    assert first["characters"] == len(whole.json()["choices"][0]["text"])
    assert not {"request", "answer"} & first.keys()
    (text,) = texts(streamed.content, streamed=True)
    assert next(row for row in rows if not row["repeatable"])["characters"] == len(text)
    text = page.render().decode()
    assert 'modelyard_requests_total{code="200",endpoint="/v1/completions",version="1"} 2.0' in text
    assert 'modelyard_shadow_answers_total{result="different",version="2"} 2.0' in text
    assert text.count("# TYPE modelyard_requests_total counter") == 1
    assert all(engine.invariants() == [] for _, engine in engines.values())


def test_a_version_compared_with_itself_is_the_same(engines: dict[str, tuple[Path, NativeEngine]]) -> None:
    results: list[str] = []
    rows: list[Any] = []
    shadow = Route(Variant("1b", "", 1.0, shadow=True), application(engines, "1", Metrics()))
    mirror = Mirror(shadow, 1.0, count=results.append, keep=rows.append, texts=True)
    state = Traffic()
    state.adopt([Route(Variant("1", ""), application(engines, "1", Metrics()))], mirror)

    async def ask() -> httpx.Response:
        app = Door(nobody, state)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x", timeout=60) as client:
            answer = await client.post("/v1/completions", json=BODY | {"prompt": ["a", "b"]})
            while not rows:
                await asyncio.sleep(0.01)
            return answer

    answer = asyncio.run(ask())
    assert results == ["same"]
    assert rows[0]["answer"] == rows[0]["shadow_answer"] == [c["text"] for c in answer.json()["choices"]]
    assert json.loads(rows[0]["request"])["prompt"] == ["a", "b"]
