"""The deploy stage from a recipe: asks its question, records the answer, stops; kept when asked to."""

from __future__ import annotations

import json
import socket
import sys
import textwrap
from pathlib import Path

import httpx
import pytest

from modelyard import load, run
from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.storage import read_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("deploy") / "hf")


def recipe(tmp_path: Path, model: Path, more: str = "port: 0") -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        textwrap.dedent(f"""
        name: tiny
        root: {tmp_path}/root
        stages:
          serve:
            kind: deploy
            inputs: {{model: {model}}}
            smoke: {{prompt: "hello", max_tokens: 8}}
            engine: {{max_sequences: 2}}
            {more}
        """)
    )
    return path


def test_deploys_answers_and_stops(ray_session: None, tmp_path: Path, model: Path) -> None:
    outcome = run(load(recipe(tmp_path, model)))
    record = json.loads(read_bytes(outcome.artifacts["serve"].join("deployment.json")))
    assert record["name"] == "tiny"
    assert record["answer"]
    assert record["latency_seconds"] > 0
    assert record["curl"].startswith(f"curl {record['url']}/v1/chat/completions")
    with pytest.raises(httpx.ConnectError):
        httpx.get(record["url"] + "/healthz")
    assert run(load(recipe(tmp_path, model))).ran == []


def test_is_left_running_when_kept(ray_session: None, tmp_path: Path, model: Path) -> None:
    from modelyard.serving import shutdown

    (model / "chat.txt").write_text("")  # another fingerprint for the same weights
    outcome = run(load(recipe(tmp_path, model)), keep=True)
    try:
        url = outcome.artifacts["serve"].manifest.extra["url"]
        assert httpx.get(url + "/healthz").json() == {"status": "ok", "model": "tiny"}
    finally:
        shutdown()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/healthz")


def test_mistakes_are_seen_before_work(ray_session: None, tmp_path: Path, model: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        with pytest.raises(ResourceError, match="cannot listen"):
            run(load(recipe(tmp_path, model, f"port: {busy.getsockname()[1]}")))
    with pytest.raises(RecipeError, match="without API keys"):
        run(load(recipe(tmp_path, model, "host: 0.0.0.0")))
    with pytest.raises(RecipeError, match="max_replicas"):
        load(recipe(tmp_path, model, "autoscaling: {min_replicas: 3, max_replicas: 2}"))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.txt").write_text("x")
    with pytest.raises(DataError, match="model folders"):
        run(load(recipe(tmp_path, empty)))
