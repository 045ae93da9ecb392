"""Which engine options mean, on whatever machine, and what is refused before one starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modelyard.engine import EngineCore, EngineOptions, NativeEngine, Request, Sampling, choose, generate, vllm_options
from modelyard.engine.protocol import Engine
from modelyard.engine.stepped import Stepped
from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.recipe.fingerprint import decisive

GREEDY = Sampling(max_tokens=6, temperature=0.0, ignore_eos=True)


def options(**changes: Any) -> EngineOptions:
    return EngineOptions.model_validate(changes)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how many GPUs this process has, and whether vLLM is there."""

    def be(gpus: int, vllm: bool) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(vllm_options, "installed", lambda: vllm)

    return be


@pytest.mark.parametrize(
    ("gpus", "vllm", "given", "means"),
    [
        (0, True, {}, "native"),
        (1, True, {}, "native"),
        (2, False, {}, "native"),
        (2, True, {}, "vllm"),
        (4, True, {"tensor_parallel": 4}, "vllm"),
        (0, True, {"tensor_parallel": 2, "device": "cpu"}, "native"),
        (2, True, {"device": "cpu"}, "native"),
        (2, True, {"backend": "native"}, "native"),
        (2, True, {"backend": "transformers"}, "transformers"),
        (0, False, {"backend": "vllm"}, "vllm"),
        (2, True, {"precision": "int8"}, "native"),  # what vLLM has not is reason enough
        (2, True, {"speculation": {}}, "native"),
        (2, True, {"kv_precision": "fp8"}, "native"),
    ],
)
def test_what_auto_means(machine: Any, gpus: int, vllm: bool, given: dict[str, Any], means: str) -> None:
    machine(gpus, vllm)
    assert choose.backend(options(**given)) == means
    assert choose.backend(options(**given).placed(gpus)) == means


def test_a_replica_with_one_gpu_of_many_is_native(machine: Any) -> None:
    machine(8, True)
    for gpus in (0, 0.5, 1):
        assert options().placed(gpus).backend == "native"
    assert options().placed(2).backend == "auto" and choose.backend(options().placed(2)) == "vllm"
    assert options(backend="vllm").placed(1).backend == "vllm"


def test_fingerprints_know_the_word_and_not_the_machine(machine: Any) -> None:
    found = []
    for gpus, vllm in ((0, False), (8, True)):
        machine(gpus, vllm)
        found.append(decisive(options()))
    assert found[0] == found[1] and found[0]["backend"] == "auto"


def test_vllm_that_is_absent_is_named_before_anything_starts(machine: Any, tiny_model: Path) -> None:
    machine(0, False)
    with pytest.raises(ResourceError, match="not installed") as raised:
        choose.check(options(backend="vllm"), 0)
    assert raised.value.place == "engine.backend" and "modelyard[vllm]" in raised.value.mend
    choose.check(options(backend="vllm"), 0, here=False)  # a cluster may have it
    choose.check(options(), 4)
    for make in (choose.start, choose.stepper):
        with pytest.raises(ResourceError, match="not installed"):
            make(tiny_model, options(backend="vllm"))
    with pytest.raises(ValueError, match="choose"):
        EngineCore(tiny_model, options(backend="vllm"))


@pytest.mark.parametrize(
    ("given", "gpus", "place"),
    [
        ({"precision": "int8"}, 1, "engine.precision"),
        ({"precision": "float16_packed"}, 1, "engine.precision"),
        ({"kv_precision": "fp8"}, 1, "engine.kv_precision"),
        ({"speculation": {"method": "prompt_lookup"}}, 1, "engine.speculation"),
        ({"cache_tokens": 100}, 1, "engine.cache_tokens"),
        ({"vllm": {"trust_remote_code": True}}, 1, "engine.vllm.trust_remote_code"),
        ({"vllm": {"dtype": "half"}}, 1, "engine.vllm.dtype"),
        ({"tensor_parallel": 4}, 2, "engine.tensor_parallel"),
        ({}, 0.5, "engine.backend"),
        ({"backend": "native", "vllm": {"enforce_eager": True}}, 0, "engine.vllm"),
    ],
)
def test_options_vllm_does_not_have_are_named(machine: Any, given: dict[str, Any], gpus: float, place: str) -> None:
    machine(0, True)
    with pytest.raises((ResourceError, RecipeError)) as raised:
        choose.check(options(**{"backend": "vllm"} | given), gpus)
    assert raised.value.place == place and raised.value.mend


def test_vllm_is_told_what_the_options_say() -> None:
    o = options(max_sequences=300, max_length=64, tensor_parallel=2, cache_bytes="1GiB", vllm={"enforce_eager": True})
    given = vllm_options.arguments(Path("folder"), o)
    wanted = {"model": "folder", "max_num_seqs": 300, "max_model_len": 64, "tensor_parallel_size": 2,
              "kv_cache_memory_bytes": 1 << 30, "enforce_eager": True, "trust_remote_code": False,
              "distributed_executor_backend": "mp", "dtype": "auto"}  # fmt: skip
    assert wanted.items() <= given.items()


def test_a_plan_looks_without_torch() -> None:
    code = (
        "import sys; from modelyard.engine import EngineOptions, choose; choose.check(EngineOptions(), 2);"
        "assert not {'torch', 'vllm'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_engine_that_is_stepped_gives_what_its_own_steps_give(tiny_model: Path) -> None:
    o = options(max_sequences=2, threads=1, precision="float32")
    core, engine = choose.stepper(tiny_model, o), choose.start(tiny_model, o)
    assert isinstance(core, EngineCore) and isinstance(engine, NativeEngine) and isinstance(engine, Engine)
    stepped = Stepped(engine, tiny_model, o)
    asked = [Request(str(i), (5, 6, 7 + i), GREEDY) for i in range(7)]
    assert [c.output.tokens for c in generate(stepped, asked)] == [c.output.tokens for c in generate(core, asked)]
    assert (stepped.end_tokens, stepped.max_length) == (core.end_tokens, core.max_length)
    assert not stepped.busy and stepped.step() == [] and stepped.waiting == 0
    endless = Sampling(max_tokens=200, ignore_eos=True)
    for i in range(3):
        stepped.add(Request(str(i), (5, 6, 7), endless))
    assert stepped.busy and stepped.waiting == 1 and {name for name, _ in stepped.step()} <= {"0", "1", "2"}
    for i in range(3):
        stepped.abort(str(i))
    with pytest.raises(DataError, match="empty"):
        stepped.add(Request("0", (), GREEDY))
    assert [c.output.tokens for c in generate(stepped, asked[:1])] == [generate(core, asked[:1])[0].output.tokens]
    stepped.update_weights([(n, t * 0) for n, t in _tensors(tiny_model)], 3)
    assert stepped.version == 3 and generate(stepped, asked[:1])[0].output.weights == 3
    stepped.close()


def _tensors(folder: Path) -> Any:
    from modelyard.engine.checkpoint import read_tensors

    return read_tensors(folder)
