"""The deploy stage from a recipe: asks its question, records the answer, follows aliases while it is kept.

That it stops when it is not kept, and has nothing to do the second time, the slice in tests/e2e proves.
"""

from __future__ import annotations

import json
import socket
import sys
import textwrap
import time
from pathlib import Path

import httpx
import pytest

from modelyard import load, run
from modelyard.cli import main
from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.serving import shutdown
from modelyard.stages import api
from modelyard.stages.served import stop_watching
from modelyard.storage import read_bytes
from modelyard.tracking import Registry

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from tiny import save_model

PIPELINES = Path(__file__).parents[2] / "pipelines"


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


def versions(url: str, count: int = 24) -> set[str]:
    """The versions that answer a few questions."""
    seen = set()
    for _ in range(count):
        body = {"model": "tiny", "prompt": "hello", "max_tokens": 1, "temperature": 0}
        answer = httpx.post(url + "/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        seen.add(answer.headers["x-modelyard-version"])
    return seen


def expect(url: str, wanted: set[str]) -> None:
    """Waits until only these versions answer."""
    deadline = time.monotonic() + 120
    while (found := versions(url)) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def test_the_canary_recipe_follows_the_aliases_there_and_back(
    ray_session: None, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path / "root")
    registry = Registry(root)
    registry.register("tiny", str(model), fingerprint="1" * 64)
    registry.register("tiny", str(save_model(tmp_path / "other", seed=3)), fingerprint="2" * 64, alias="candidate")
    monkeypatch.setenv("MODELYARD_ROOT", root)
    monkeypatch.setenv("MODELYARD_MODEL", "tiny")
    toy = ["port=0", "engine.max_sequences=2", "smoke.max_tokens=4", "traffic.watch_s=0.5", "traffic.canary.percent=50"]
    outcome = run(load(PIPELINES / "canary.yaml", [f"serve.{assignment}" for assignment in toy]), keep=True)
    try:
        url = outcome.artifacts["serve"].manifest.extra["url"]
        record = json.loads(read_bytes(outcome.artifacts["serve"].join("deployment.json")))
        assert (record["name"], record["url"], record["kept"]) == ("tiny", url, True)
        assert record["answer"]
        assert record["curl"].startswith(f"curl {url}/v1/chat/completions")
        assert httpx.get(url + "/healthz").json() == {"status": "ok", "model": "tiny"}
        assert versions(url) == {"1", "2"}
        for command, wanted in ((["promote", "tiny", "2"], {"2"}), (["rollback", "tiny"], {"1", "2"})):
            with pytest.raises(SystemExit) as end:
                main([*command, "--root", root])
            assert end.value.code == 0
            expect(url, wanted)
    finally:
        stop_watching()
        shutdown()
    assert "version 1 -> 2" in (out := capsys.readouterr().out) and "version 2 -> 1" in out
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/healthz")
    client = registry.client
    experiment = client.get_experiment_by_name("tiny-serving")
    assert experiment is not None
    (deployment,) = client.search_runs([experiment.experiment_id])
    assert deployment.info.status == "FINISHED"
    assert deployment.data.params["traffic.canary.percent"] == "50.0"
    assert deployment.data.tags["version"] == "1 (with 50% to 2)"
    history = client.get_metric_history(deployment.info.run_id, "replicas")
    assert {point.value for point in history} >= {1.0, 2.0}
    assert deployment.data.metrics.keys() >= {"tokens_per_second", "answer_p99", "version_2/requests_per_second"}
    path = client.download_artifacts(deployment.info.run_id, "deployments.json", str(tmp_path))
    rolled = [[v["version"] for v in event["versions"]] for event in json.loads(Path(path).read_text())]
    assert rolled == [["1", "2"], ["2"], ["1", "2"]]


@pytest.mark.parametrize("name", ["serve_chat", "canary"])
def test_the_serving_recipes_are_plans(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path))
    (stage,) = api.plan(load(PIPELINES / f"{name}.yaml", ["serve.port=0"]))
    assert not stage.cached
    assert stage.estimate.memory_bytes


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
    with pytest.raises(RecipeError, match="either the input"):
        run(load(recipe(tmp_path, model, "reference: models:/tiny@champion")))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "x.txt").write_text("x")
    with pytest.raises(DataError, match="model folders"):
        run(load(recipe(tmp_path, empty)))
