"""The whole slice at toy size: from raw text to an answer over HTTP, killed on the way, then run again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelyard.storage import ArtifactStore
from modelyard.tracking import History, resolve, status

RECIPE = Path(__file__).parent / "slice.yaml"
MODELYARD = [sys.executable, "-c", "from modelyard.cli import main; main()"]
STAGES = ["corpus", "pairs", "tokens", "base", "chat", "evaluation", "registered", "serve"]


def start(root: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "MODELYARD_ROOT": str(root)}
    return subprocess.Popen(
        [*MODELYARD, "run", str(RECIPE)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def published(root: Path) -> set[str]:
    return {artifact.stage for artifact in ArtifactStore(str(root)).all()}


def wait_for(process: subprocess.Popen[str], root: Path, stage: str, limit: float = 500) -> None:
    """Until a stage is published, or its checkpoints appear (`base/`)."""
    end = time.monotonic() + limit
    while time.monotonic() < end and process.poll() is None:
        if stage.endswith("/"):
            if list((root / "work").glob(f"{stage[:-1]}-*/checkpoints/*")):
                return
        elif stage in published(root):
            return
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_raw_text_to_served_model_through_kills(no_ray: None, tmp_path: Path) -> None:
    root = tmp_path / "root"
    before: dict[str, str] = {}
    # kill -9 in the middle of training, Ctrl-C after fine-tuning.
    for stage, sign in (("base/", signal.SIGKILL), ("chat", signal.SIGINT)):
        process = start(root)
        wait_for(process, root, stage)
        process.send_signal(sign)
        output, _ = process.communicate(timeout=120)
        assert process.returncode in (-9, 130), output
        now = {a.stage: a.manifest.fingerprint + a.manifest.ended.isoformat() for a in ArtifactStore(str(root)).all()}
        assert before.items() <= now.items(), "what was published is not made again"
        before = now

    process = start(root)
    output, _ = process.communicate(timeout=800)
    assert process.returncode == 0, output
    assert "serve: answered:" in output
    artifacts = {a.stage: a for a in ArtifactStore(str(root)).all()}
    assert list(artifacts) == sorted(STAGES)
    for artifact in artifacts.values():
        artifact.verify()
    assert ArtifactStore(str(root)).unpublished() == []

    base = artifacts["base"].manifest.metrics
    # 20,000 tokens are enough to leave chance (log 600 = 6.40 nats), not to learn a language.
    assert base["heldout_loss"] < 6.1
    # What it spent, where that comes from, and the prediction beside it.
    assert base["energy_kwh"] > 0 and base["cost_usd"] > 0 and base["step_seconds"] > 0
    assert "Predicted against measured" in artifacts["base"].local("report.html").read_text()
    assert all("energy_kwh" in a.manifest.metrics for a in artifacts.values())
    (run,) = History(str(root)).finished(("pretrain",))
    assert run.tags["modelyard.energy_source"] and run.metrics["predicted_seconds"] > 0
    assert run.metrics["peak_memory_bytes"] == base["peak_memory_bytes"] > 50e6
    evaluation = json.loads(artifacts["evaluation"].local("evaluation.json").read_text())
    assert evaluation
    uri, version = resolve("models:/slice@champion", root=str(root))
    assert version == 1
    assert (Path(uri) / "model.safetensors").exists()

    (latest, *_) = status(str(root), "slice")
    assert latest.status == "FINISHED"
    again_started = time.monotonic()
    again = start(root)
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0
    assert output.count("done before") == len(STAGES)
    assert time.monotonic() - again_started < 30


@pytest.mark.slow
def test_port_in_use_is_said_before_training(no_ray: None, tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = subprocess.run(
            [*MODELYARD, "run", str(RECIPE), "--set", f"serve.port={port}"],
            env={**os.environ, "MODELYARD_ROOT": str(tmp_path)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert f"cannot listen on 127.0.0.1:{port}" in " ".join(result.stderr.split())
    assert published(tmp_path) == set()


@pytest.mark.slow
def test_a_model_too_large_for_the_worker_and_no_documents_left(no_ray: None, tmp_path: Path) -> None:
    environment = {**os.environ, "MODELYARD_ROOT": str(tmp_path)}
    big = ["--set", "base.model={preset: llama-70b}"]
    result = subprocess.run(
        [*MODELYARD, "run", str(RECIPE), *big], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert "GiB" in result.stderr
    assert published(tmp_path) == set()
    strict = ["--to", "corpus", "--set", "corpus.steps.1.quality.gopher.min_words=1000000"]
    result = subprocess.run(
        [*MODELYARD, "run", str(RECIPE), *strict], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2, result.stderr
    assert "gopher" in result.stderr
