"""A model cut over several processes answers as the whole one. On CPUs, by gloo; on GPUs NCCL takes its place."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from marks import CPU
from test_identity import ARCHITECTURES, answers, prompts
from tiny import save_model

from modelyard.engine import EngineCore, EngineOptions
from modelyard.engine.checkpoint import read_config, read_tensors
from modelyard.engine.request import EngineStopped
from modelyard.engine.tensor_parallel import Leader, cut, local_config
from modelyard.errors import DataError

pytestmark = CPU
WHOLE = EngineOptions(max_sequences=3, step_tokens=17, threads=1, precision="float32", block_tokens=4)
SPLIT = WHOLE.model_copy(update={"tensor_parallel": 2})


@pytest.mark.parametrize("name", ["llama-biases", "qwen3-moe"])
def test_a_cut_model_answers_as_the_whole(name: str, tmp_path: Path, cores: list[EngineCore]) -> None:
    family, overrides = ARCHITECTURES[name]
    folder = save_model(tmp_path / "a", family, **overrides)
    other = save_model(tmp_path / "b", family, seed=1, **overrides)
    core, whole = EngineCore(folder, SPLIT), EngineCore(folder, WHOLE)
    cores.append(core)
    given = prompts(core.config.vocabulary, [1, 5, 40, 33, 2])
    assert answers(core, given, 20) == answers(whole, given, 20)
    assert core.decoder.weights.layers[0].qkv.rows * 2 == whole.decoder.weights.layers[0].qkv.rows  # type: ignore[union-attr]
    for each in (core, whole):
        with pytest.raises(DataError, match="no place"):
            each.update_weights([("nobody.weight", torch.zeros(3))], version=1)
        each.update_weights(read_tensors(other), version=2)
    assert answers(core, given, 20) == answers(whole, given, 20), "with new weights"
    assert core.invariants() == []


def test_a_lost_worker_is_said_and_none_is_left_behind(tiny_model: Path, cores: list[EngineCore]) -> None:
    core = EngineCore(tiny_model, SPLIT)
    cores.append(core)
    assert isinstance(core.decoder, Leader)
    (worker,) = core.decoder._others
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join(10)
    with pytest.raises(EngineStopped, match="slice-1 of the model ended"):
        answers(core, [[5, 6, 7]], 4)
    second = EngineCore(tiny_model, SPLIT)
    cores.append(second)
    assert isinstance(second.decoder, Leader)
    (worker,) = second.decoder._others
    second.close()
    end = time.monotonic() + 10
    while worker.is_alive() and time.monotonic() < end:
        time.sleep(0.05)
    assert worker.exitcode == 0


def test_slices_make_the_whole(tiny_model: Path) -> None:
    for name, tensor in read_tensors(tiny_model):
        parts = [cut(name, tensor, rank, 2) for rank in range(2)]
        if parts[0].shape == tensor.shape:
            assert torch.equal(parts[0], tensor)
        else:
            along = next(i for i, (a, b) in enumerate(zip(parts[0].shape, tensor.shape, strict=True)) if a != b)
            assert torch.equal(torch.cat(parts, along), tensor)
    bias = torch.ones(4)
    assert cut("model.layers.0.mlp.down_proj.bias", bias, 1, 2).sum() == 0, "added once"


def test_what_cannot_be_cut_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 key-value heads are not divisible by 4"):
        local_config(read_config(tiny_model), 4)
    family, overrides = ARCHITECTURES["gpt2"]
    with pytest.raises(DataError, match="GPT-2"):
        EngineCore(save_model(tmp_path / "gpt2", family, **overrides), SPLIT)
