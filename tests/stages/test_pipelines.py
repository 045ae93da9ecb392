"""The recipes for clusters: each is planned and fits its hardware, and its toy line runs here."""

from __future__ import annotations

import json
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from modelyard.cli.work import profiled
from modelyard.errors import RecipeError
from modelyard.planner.hardware import find_hardware
from modelyard.stages import api

PIPELINES = Path(__file__).parents[2] / "pipelines"
BIG = ("pretrain_1b", "pretrain_70b", "pretrain_moe")


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A root and a little input, so that paths of the recipes lead somewhere."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "a.jsonl").write_text('{"text": "hello"}\n')
    monkeypatch.setenv("MODELYARD_INPUT", str(tmp_path / "input"))
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path / "root"))
    return tmp_path


def toy(name: str) -> list[str]:
    """The assignments of the recipe's own toy line."""
    lines = (PIPELINES / f"{name}.yaml").read_text().split("\n")
    command = next(line for line in lines if "modelyard run" in line and "--set" in line)
    words = shlex.split(command.lstrip("# "))
    assert words[0] == "MODELYARD_INPUT=docs"
    return [value for flag, value in pairwise(words) if flag == "--set"]


@pytest.mark.parametrize("name", BIG)
def test_the_plan_says_it_fits(name: str) -> None:
    recipe = api.load(PIPELINES / f"{name}.yaml")
    plan = {stage.name: stage for stage in api.plan(recipe)}
    base = plan["base"].estimate
    hardware = find_hardware(recipe.stages["base"].resources.hardware)
    assert base.memory_bytes is not None
    assert base.memory_bytes < 0.9 * hardware.memory
    assert base.parameters is not None
    assert base.parameters > 5e8
    assert base.seconds is not None
    assert base.cost_usd is not None


@pytest.mark.parametrize("name", BIG)
def test_the_toy_line_is_a_plan_for_this_machine(name: str) -> None:
    recipe = api.load(PIPELINES / f"{name}.yaml", toy(name))
    resources = recipe.stages["base"].resources
    assert (resources.hardware, resources.gpus_per_worker) == (None, 0)
    assert resources.workers <= 2
    (base,) = [stage for stage in api.plan(recipe) if stage.name == "base"]
    assert (base.estimate.parameters or 0) < 5e6


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_toy_line_of_the_mixture_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELYARD_INPUT", str(PIPELINES.parent / "docs"))
    few = ["base.steps=12", "base.samples.every=12"]
    recipe = profiled(api.load(PIPELINES / "pretrain_moe.yaml", [*toy("pretrain_moe"), *few]), "steps=4..5")
    outcome = api.run(recipe)
    base = outcome.artifacts["base"]
    report = base.local("report.md").read_text()
    for title in ("Predicted against measured", "Where the time of a step goes", "What the model writes"):
        assert f"## {title}" in report
    assert "| 12 | The meaning of |" in report
    assert json.loads(base.local("model/config.json").read_text())["model_type"] == "mixtral"
    assert {p.name for p in base.local("profile").iterdir()} >= {"trace-rank-0.json.gz", "trace-rank-1.json.gz"}


def test_a_profile_needs_a_range_and_something_that_trains() -> None:
    recipe = api.load(PIPELINES / "pretrain_1b.yaml")
    assert profiled(recipe, "steps=10..12").stages["base"].profile.last == 12  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match=r"write steps=10\.\.12"):
        profiled(recipe, "10")
    with pytest.raises(RecipeError, match="no stage of the recipe trains"):
        profiled(api.load(PIPELINES / "clean_jsonl.yaml"), "steps=2..3")
