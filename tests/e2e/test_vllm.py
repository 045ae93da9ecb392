"""`engine.backend: vllm` under Ray, where vLLM is installed (docs/engine.md says how, with its CPU build):

PYTHONPATH=platform .venv-vllm/bin/python -m pytest tests/e2e/test_vllm.py tests/engine/test_vllm_engine.py
"""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))
sys.path.insert(0, str(Path(__file__).parents[1] / "serving"))

from asking import MINUTES, wait_for
from tiny import save_model
from training_stage import artifact, run_stage

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, ServerHandle, launch
from modelyard.serving.rollout import calls
from modelyard.stages import session
from modelyard.stages.align import AlignOptions
from modelyard.stages.generate import GenerateOptions
from modelyard.storage import Artifact, Files, find_files

VLLM: dict[str, Any] = {
    "backend": "vllm", "precision": "float32", "max_sequences": 4, "threads": 1, "cache_bytes": "64MB",
    "vllm": {"enforce_eager": True},
}  # fmt: skip
NATIVE: dict[str, Any] = {"backend": "native", "precision": "float32", "max_sequences": 4, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's attention on a CPU knows no heads narrower than 32."""
    return save_model(tmp_path_factory.mktemp("artifact") / "model", head_dim=32, max_position_embeddings=1024)


def files(folder: Path) -> Files:
    return find_files((f"{folder}/*",), ())


@pytest.mark.usefixtures("ray_session")
def test_a_batch_has_the_native_engine_s_answers(model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [{"prompt": f"The scheduler {i}", "id": i} for i in range(12)]
    lines += [{"messages": [{"role": "user", "content": "hello"}]}, {"text": "no prompt"}]
    (rows / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = []
    for engine in (NATIVE, VLLM):
        folder = tmp_path / engine["backend"]
        options = GenerateOptions.model_validate(
            {"sampling": {"max_tokens": 16}, "rows_a_unit": 5, "max_errors": 0.2, "engine": engine}
        )
        result = run_stage(options, {"model": files(model), "rows": files(rows)}, folder)
        assert (result.counts["rows"], result.counts["errors"]) == (14, 1)
        parts = sorted((folder / "out" / "data").iterdir())
        answered = [json.loads(line) for part in parts for line in part.read_text().splitlines()]
        # Bytes that make no character are shown differently.
        found.append([row | {"generated": [c for c in row["generated"] or "" if c.isascii()]} for row in answered])
    assert found[0] == found[1] and len({"".join(row["generated"]) for row in found[0]}) > 8


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServerHandle]:
    session.start(2)
    options = ServeOptions(
        port=0, autoscaling=Autoscaling(min_replicas=1, max_replicas=1), engine=EngineOptions.model_validate(VLLM),
        ready_timeout_s=900,
    )  # fmt: skip
    handle = launch(str(model), "tiny", options, version="1")
    yield handle
    handle.shutdown()


def test_a_server_answers_the_official_client(server: ServerHandle) -> None:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=MINUTES) as client:
        common: dict[str, Any] = {
            "model": "tiny", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 12, "temperature": 0,
        }  # fmt: skip
        whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=3)
        assert whole.choices[0].logprobs is not None
        content = whole.choices[0].logprobs.content or []
        assert whole.usage is not None and len(content) == whole.usage.completion_tokens
        assert all(len(t.top_logprobs) == 3 and t.logprob == t.top_logprobs[0].logprob <= 0 for t in content)
        chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert len(chunks) > 3 and text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
        seeded = [client.completions.create(model="tiny", prompt="The", max_tokens=9, seed=3, n=2) for _ in range(2)]
        assert [c.text for c in seeded[0].choices] == [c.text for c in seeded[1].choices]
        with pytest.raises(openai.BadRequestError, match="answer or to embed"):
            client.embeddings.create(model="tiny", input="The")
        with client.chat.completions.create(**common | {"max_tokens": 900}, stream=True) as left:
            next(iter(left))
    wait_for(lambda: all(s.running == 0 for s in calls("engine-1", "stats", "modelyard")), "an idle engine", every=0.2)
    assert calls("engine-1", "invariants", "modelyard") == [[]]
    figures: dict[str, float] = {}
    for line in httpx.get(server.url + "/metrics").text.splitlines():
        if not line.startswith("#"):
            name = line.split("{")[0].split(" ")[0]
            figures[name] = figures.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    assert figures["modelyard_replicas"] == 1 and figures["modelyard_tokens_total"] > 60
    assert figures["modelyard_time_to_first_token_seconds_count"] > 3
    (stats,) = calls("engine-1", "stats", "modelyard")
    assert stats.blocks > 100 and stats.output_tokens_total > 60 and stats.steps_total > 20


def test_a_lost_engine_is_replaced_and_leaves_nothing_behind(server: ServerHandle) -> None:
    def engines() -> set[int]:
        found = set[int]()
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("VLLM::EngineCor") and process.status() != psutil.STATUS_ZOMBIE:
                    found.add(process.pid)
        return found

    body = {"model": "tiny", "prompt": "The", "max_tokens": 4, "temperature": 0}
    before = httpx.post(server.url + "/v1/completions", json=body, timeout=MINUTES).json()["choices"][0]["text"]
    (old,) = engines()
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: engines() - {old}, "another engine", every=0.5)

    def answer() -> str | None:
        answered = httpx.post(server.url + "/v1/completions", json=body, timeout=MINUTES)
        return answered.json()["choices"][0]["text"] if answered.status_code == 200 else None

    assert wait_for(answer, "an answer", every=0.5) == before
    wait_for(lambda: len(engines()) == 1, "a single engine", every=0.5)


@pytest.mark.parametrize("apart", [False, True], ids=["beside the trainer", "actors"])
def test_a_policy_learns_from_answers_of_vllm(model: Path, apart: bool, tmp_path: Path) -> None:
    session.start(3)
    policy: Artifact = artifact(model.parent, "finetune")
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": chr(97 + i % 26), "answer": "x"}) + "\n" for i in range(20)))
    rollouts: dict[str, Any] = {
        "group": 4, "max_tokens": 5, "rows": 128, "rewards": [{"kind": "regex", "pattern": "[a-m]"}],
    }  # fmt: skip
    if apart:
        rollouts["engines"] = {"count": 1, "cpus": 1}
    options = AlignOptions.model_validate(
        {"kind": "align", "method": "grpo", "sequence_length": 48, "steps": 3, "global_batch": 2, "learning_rate": 1e-2,
         "heldout": 0.2, "adapter": {"lora": {"r": 4}}, "rollouts": rollouts, "engine": VLLM}
    )  # fmt: skip
    result = run_stage(options, {"model": policy, "data": find_files((str(data),), ())}, tmp_path)
    assert {"reward", "first_reward", "heldout_reward", "heldout_before_reward"} <= set(result.metrics)
    rows = list(csv.DictReader((tmp_path / "out" / "loss.csv").read_text().splitlines()))
    # Engine and trainer give the answers the same log-probabilities after every update: the weights have arrived.
    gaps = [float(row["engine_difference_max"]) for row in rows if row.get("engine_difference_max")]
    assert len(gaps) == 3 and max(gaps) < 1e-3
