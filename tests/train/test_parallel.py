"""Every layout trains as one process does: same losses, same norms, same exported weights, checkpoints that move on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_cases import MODELS, STEPS, job, trained_in_turn
from safetensors.torch import load_file

from modelyard.errors import RecipeError, ResourceError
from modelyard.train.method_options import CompressOptions
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.parallel.layout import check_layout, plan_layout

Case = tuple[str, dict[str, Any], dict[str, Any]]

TWO: dict[str, Case] = {
    "DDP": ("llama", {"data": 2}, {}),
    "ZeRO-2": ("llama", {"reshard": False}, {}),
    "ZeRO-3, offload, prefetch, recompute": (
        "llama",
        {"shard": 2, "offload": True, "prefetch": 2},
        {"recompute": "full"},
    ),
    "TP": ("llama", {"tensor": 2, "sequence": False}, {}),
    "TP + SP, selective recompute": ("qwen3", {"tensor": 2}, {"recompute": "selective"}),
    "TP of GPT-2": ("gpt2", {"tensor": 2}, {}),
    "TP + SP of experts": ("mixtral", {"tensor": 2}, {}),
    "CP": ("llama", {"context": 2}, {"document_mask": True}),
    "CP of experts, capacity": ("mixtral", {"context": 2}, {"document_mask": True, "routing": {"capacity": 1.0}}),
    "EP, capacity": ("qwen3_moe", {"expert": 2}, {"routing": {"capacity": 1.0}}),
    "PP 1F1B": ("tied", {"pipeline": 2}, {}),
    "PP GPipe": ("gpt2", {"pipeline": 2, "schedule": "gpipe"}, {}),
    "PP interleaved": ("deep_moe", {"pipeline": 2, "schedule": "interleaved"}, {}),
    "PP zero-bubble": ("deep", {"pipeline": 2, "schedule": "zero-bubble"}, {}),
    "PP ZBV": ("tied", {"pipeline": 2, "schedule": "zbv"}, {}),
    "DDP of T5": ("t5", {"data": 2}, {"objective": "span_corruption"}),
    "FSDP of T5": ("t5", {}, {"objective": "span_corruption"}),
    "FSDP, a batch that does not divide": ("llama", {}, {"global_batch": 5, "micro_batch": 1}),
    "PP DualPipeV": ("deep", {"pipeline": 2, "schedule": "dualpipev"}, {"micro_batch": 1}),
}
FOUR: dict[str, Case] = {
    "TP x FSDP": ("llama", {"tensor": 2, "shard": 2}, {}),
    "PP x FSDP": ("llama", {"pipeline": 2, "shard": 2}, {}),
    "TP x PP": ("tied", {"tensor": 2, "pipeline": 2}, {}),
    "CP x FSDP": ("llama", {"context": 2, "shard": 2}, {"document_mask": True}),
    "HSDP x TP": ("llama", {"data": 2, "tensor": 2}, {}),
    "EP x FSDP": ("qwen3_moe", {"expert": 2, "shard": 2}, {}),
}


GOES_ON = ("PP ZBV", "EP, capacity", "TP x FSDP", "TP x PP")
"""Layouts whose checkpoints go on in one process."""


ACCUMULATES = {
    "DDP": 2, "ZeRO-2": 2, "TP + SP, selective recompute": 4, "CP": 4, "EP, capacity": 2, "TP x FSDP": 2,
}  # fmt: skip
"""Sequences of a pass where there are two passes a step, besides pipelines. One process takes the batch as a whole."""

COMPRESSED: dict[str, Case] = {
    kind: ("llama", {"data": 2}, {"compress": {"kind": kind, "after": 4}})
    for kind in ("bf16", "fp16", "powersgd", "sign")
}
"""Layouts that follow one process only about."""


def passes(name: str, parallel: dict[str, Any]) -> dict[str, int]:
    """The option that makes several passes a step, where the case is to have them."""
    return {"micro_batch": ACCUMULATES.get(name, 2)} if "pipeline" in parallel or name in ACCUMULATES else {}


def reference(case: Case) -> str:
    return " ".join([case[0], *(str(value) for value in method(case).values())])


def method(case: Case) -> dict[str, Any]:
    """What one process must be told too."""
    told = ("document_mask", "routing", "global_batch", "objective")
    return {name: value for name, value in case[2].items() if name in told}


@pytest.fixture(scope="module")
def alone(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process comes to, by model."""
    folder = tmp_path_factory.mktemp("alone")
    jobs = {}
    for case in [*TWO.values(), *FOUR.values()]:
        jobs[reference(case)] = job(tokens, folder / reference(case), case[0], **method(case))
    return {"folder": folder, **trained_in_turn(1, jobs, folder / "out.json")}


@pytest.fixture(scope="module", params=[2, 4])
def together(request: pytest.FixtureRequest, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two or four processes come to, by layout."""
    workers, folder = request.param, tmp_path_factory.mktemp("together")
    cases = TWO if workers == 2 else FOUR
    every = cases | COMPRESSED if workers == 2 else cases
    jobs = {
        name: job(
            tokens,
            folder / name,
            model,
            checkpoints=name in GOES_ON,
            parallel=ParallelOptions(**parallel),
            **passes(name, parallel) | train,
        )
        for name, (model, parallel, train) in every.items()
    }
    return {"folder": folder, "cases": cases, "outcomes": trained_in_turn(workers, jobs, folder / "out.json")}


def losses(outcome: dict[str, Any]) -> list[float]:
    assert [row["step"] for row in outcome["history"]] == list(range(1, STEPS + 1))
    return [row["loss"] for row in outcome["history"]]


def test_every_layout_trains_as_one_process(alone: dict[str, Any], together: dict[str, Any]) -> None:
    wrong = {}
    for name, case in together["cases"].items():
        one, many = alone[reference(case)], together["outcomes"][name]
        apart = max(abs(a - b) for a, b in zip(losses(one), losses(many), strict=True))
        norms = max(
            abs(a["grad_norm"] - b["grad_norm"]) / a["grad_norm"]
            for a, b in zip(one["history"], many["history"], strict=True)
        )
        good = apart < 1e-5 and norms < 1e-3 and abs(one["heldout"] - many["heldout"]) < 1e-5
        if not good or one["parameters"] != many["parameters"]:
            wrong[name] = (apart, norms, one["heldout"] - many["heldout"], one["parameters"], many["parameters"])
    assert not wrong


def test_every_layout_exports_the_weights_of_one_process(alone: dict[str, Any], together: dict[str, Any]) -> None:
    for name, case in together["cases"].items():
        expected = load_file(alone["folder"] / reference(case) / "model" / "model.safetensors")
        found = load_file(together["folder"] / name / "model" / "model.safetensors")
        assert found.keys() == expected.keys(), name
        for key, value in expected.items():
            assert torch.allclose(found[key], value, atol=2e-4), (name, key)


def test_compressed_gradients_train_nearly_the_same(alone: dict[str, Any], together: dict[str, Any]) -> None:
    exact = losses(alone["llama"])
    for kind in COMPRESSED if "DDP" in together["cases"] else ():
        found = losses(together["outcomes"][kind])
        assert found != exact, kind
        assert found[:2] == pytest.approx(exact[:2], abs=2e-3), kind
        assert found[-1] == pytest.approx(exact[-1], abs=0.3 if kind in ("powersgd", "sign") else 2e-2), kind
        assert found[-1] < found[0], kind


def test_checkpoints_of_split_models_go_on_in_one_process(
    tokens: Path, tmp_path: Path, alone: dict[str, Any], together: dict[str, Any]
) -> None:
    names = [name for name in GOES_ON if name in together["cases"]]
    jobs = {}
    for name in names:
        folder = tmp_path / name
        shutil.copytree(together["folder"] / name / "checkpoints", folder / "checkpoints")
        shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
        case = together["cases"][name]
        jobs[name] = job(tokens, folder, case[0], checkpoints=True, **method(case))
    for name, outcome in trained_in_turn(1, jobs, tmp_path / "out.json").items():
        assert "resumed from step-00000010" in outcome["said"][0], name
        expected = losses(alone[reference(together["cases"][name])])
        assert losses(outcome) == pytest.approx(expected, abs=1e-5), name


SIZES = MODELS["llama"]


@pytest.mark.parametrize(
    ("model", "parallel", "workers", "message"),
    [
        ("llama", {"tensor": 3}, 8, "tensor 3.* but there are 8 workers.*the nearest layout .*tensor (2|4)"),
        ("llama", {"tensor": 8}, 8, r"attention heads \(4\) cannot be divided by tensor parallel 8.*the nearest .* 4"),
        ("llama", {"tensor": 4}, 4, "2 key-value heads cannot be divided by tensor 4.* is 2"),
        ("llama", {"pipeline": 3}, 3, r"number of layers \(2\) cannot be divided"),
        ("mixtral", {"expert": 3}, 3, r"number of experts \(4\) cannot be divided by expert parallel 3"),
        ("llama", {"expert": 2}, 2, "without experts"),
        ("llama", {"context": 8}, 8, "4 attention heads cannot be divided by tensor x context 8"),
        ("llama", {"context": 3}, 3, r"sequence length \(32\) cannot be divided by context parallel 3"),
        ("llama", {"pipeline": 2, "schedule": "1f1b", "virtual": 2}, 2, "one chunk a worker"),
        ("llama", {"tensor": 2, "sequence": 4}, 2, "sequence 4 differs from tensor 2"),
        ("t5", {"tensor": 2}, 2, "models of type t5 are not split by tensor"),
        ("bloom", {"pipeline": 2}, 2, "models of type bloom are not split into pipeline stages"),
    ],
)
def test_a_layout_that_does_not_fit_is_named_before_any_work(
    model: str, parallel: dict[str, Any], workers: int, message: str
) -> None:
    config = MODELS.get(model, {"model_type": model, "d_model": 32, "num_layers": 2, "vocab_size": 300})
    options = TrainOptions(global_batch=24, micro_batch=1, parallel=ParallelOptions(**parallel))
    with pytest.raises((RecipeError, ResourceError), match=f"(?s){message}") as caught:
        check_layout(options, workers, {"vocab_size": 300, **config}, 32)
    assert caught.value.mend


def test_only_replicas_compress_gradients() -> None:
    options = TrainOptions(compress=CompressOptions(kind="bf16"), parallel=ParallelOptions(shard=2))
    with pytest.raises(RecipeError, match="an exchange between replicas, but the layout splits") as caught:
        check_layout(options, 2)
    assert "data: 2" in caught.value.mend


def test_a_batch_must_fill_the_pipeline() -> None:
    with pytest.raises(RecipeError, match="2 micro-batches a step do not fill a 1f1b pipeline of 4"):
        check_layout(TrainOptions(global_batch=4, micro_batch=2, parallel=ParallelOptions(pipeline=4)), 4)
    check_layout(TrainOptions(global_batch=32, parallel=ParallelOptions(pipeline=4)), 4)


def test_the_planner_is_asked_about_the_same_layout() -> None:
    options = TrainOptions(
        global_batch=64, micro_batch=1, parallel=ParallelOptions(data=2, tensor=2, pipeline=2, context=2)
    )
    layout = plan_layout(options, 32)
    assert layout.devices == 32
    assert (layout.data, layout.shard, layout.tensor, layout.pipeline, layout.context) == (4, 2, 2, 2, 2)
    assert plan_layout(TrainOptions(parallel=ParallelOptions(data=4)), 4).zero == 0
