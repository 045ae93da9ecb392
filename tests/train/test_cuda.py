"""The loop on a GPU: losses of a CPU, mixed precision, exact resume. Runs where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import pretraining

from modelyard.models import load_model
from modelyard.train.loop import Outcome
from modelyard.train.metrics import StepMetrics
from modelyard.train.programs import pretrain
from modelyard.train.world import World

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU, CPU = (World(0, 1, torch.device(kind)) for kind in ("cuda", "cpu"))


class Stop(Exception):
    """Stands for a crash."""


def losses(outcome: Outcome) -> list[float]:
    return [row["loss"] for row in outcome.history]


@pytest.fixture(scope="module")
def exact(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return pretrain(pretraining(tokens, tmp_path_factory.mktemp("cpu"), precision="fp32"), CPU)


@pytest.mark.parametrize("changes", [{}, {"compile": True}, {"recompute": "full"}, {"document_mask": True}])
def test_single_precision_gives_the_losses_of_a_cpu(tokens: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    on_cpu = pretrain(pretraining(tokens, tmp_path / "cpu", **{**changes, "compile": False}, precision="fp32"), CPU)
    on_gpu = pretrain(pretraining(tokens, tmp_path / "gpu", **changes, precision="fp32"), GPU)
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=2e-4)
    assert on_gpu.peak_bytes > 0


@pytest.mark.parametrize("precision", ["auto", "bf16", "fp16"])
def test_mixed_precision_learns_alike(tokens: Path, tmp_path: Path, exact: Outcome, precision: str) -> None:
    outcome = pretrain(pretraining(tokens, tmp_path, precision=precision), GPU)
    assert losses(outcome) == pytest.approx(losses(exact), abs=0.05)
    assert load_model(tmp_path / "model").lm_head.weight.dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "lamb", "adafactor"])
def test_optimizers_step_as_on_a_cpu(tokens: Path, tmp_path: Path, optimizer: str) -> None:
    given: dict[str, Any] = {"optimizer": optimizer, "precision": "fp32", "learning_rate": 1e-3}
    on_cpu, on_gpu = (pretrain(pretraining(tokens, tmp_path / w.device.type, **given), w) for w in (CPU, GPU))
    # Muon's Newton-Schulz runs in bfloat16 on a GPU.
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=5e-2 if optimizer == "muon" else 2e-3)


def test_fp8_learns_alike(tokens: Path, tmp_path: Path, exact: Outcome) -> None:
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 units")
    outcome = pretrain(pretraining(tokens, tmp_path, precision="fp8", compile=True), GPU)
    assert losses(outcome) == pytest.approx(losses(exact), abs=0.1)


def test_one_worker_of_a_process_group(tokens: Path, tmp_path: Path, exact: Outcome) -> None:
    job = pretraining(tokens, tmp_path, precision="fp32")
    (tmp_path / "job.json").write_text(json.dumps({"pretrain": job.model_dump(mode="json")}))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "--master-port", "29511"]
    done = subprocess.run(
        [*command, "-m", "modelyard.train", str(tmp_path / "job.json")], capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["loss"] for row in rows] == pytest.approx(losses(exact), abs=2e-4)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_resumes_where_it_was(tokens: Path, tmp_path: Path, asynchronous: bool) -> None:
    given: dict[str, Any] = {"precision": "fp32", "async_checkpoints": asynchronous}
    whole = pretrain(pretraining(tokens, tmp_path / "whole", **given), GPU)

    def sink(metrics: StepMetrics) -> None:
        if metrics.step == 10:
            raise Stop

    job = pretraining(tokens, tmp_path / "cut", **given)
    with pytest.raises(Stop):
        pretrain(job, GPU, sink)
    assert losses(pretrain(job, GPU)) == pytest.approx(losses(whole), abs=1e-5)
