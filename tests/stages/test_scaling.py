"""Stage `scaling`: a ladder is trained, fitted and verified; it goes on where it was; bad ladders are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from training_stage import artifact, plan, run_stage

from modelyard.errors import RecipeError
from modelyard.stages.scaling import ScalingOptions, ScalingStage
from modelyard.stages.train_worker import load_program
from modelyard.train.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from training_parts import write_tokens

SIZES = {
    name: {"preset": "llama-2m", "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1}
    for name, width in (("a", 8), ("b", 16), ("c", 24))
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens"))


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trains in this process instead of on Ray Train, which other tests cover; notes what is said."""
    said: list[str] = []

    def run_here(ctx: Any, assignment: Any, steps: int, estimate: Any = None) -> Any:
        paths = {name: place[0].uri for name, place in assignment.places.items()}
        job = assignment.job.model_copy(update=paths)
        program = load_program(assignment.program)
        return program(job, World(0, 1, torch.device("cpu")), lambda metrics: None, said.append, None)

    monkeypatch.setattr("modelyard.stages.workers.run_workers", run_here)
    return said


def options(**changes: Any) -> ScalingOptions:
    values = {
        "kind": "scaling", "sizes": SIZES, "tokens_per_parameter": [2, 6], "global_batch": 8, "learning_rate": 2e-2,
        "predict": {**SIZES["c"], "hidden_size": 32}, "verify": True, "bootstrap": 4, **changes,
    }  # fmt: skip
    return ScalingOptions.model_validate(values)


def test_a_ladder_is_trained_fitted_and_verified(tokens: Path, tmp_path: Path, trained: list[str]) -> None:
    inputs = {"tokens": artifact(tokens, "tokenize")}
    result = run_stage(options(), inputs, tmp_path)
    assert result.counts["runs"] == 7
    runs = json.loads((tmp_path / "out" / "runs.json").read_text())
    assert [run["name"] for run in runs] == ["a-2", "a-6", "b-2", "b-6", "c-2", "c-6", "next-6"]
    assert [run["non_embedding"] for run in runs] == sorted(run["non_embedding"] for run in runs)
    assert runs[1]["tokens"] == pytest.approx(6 * runs[1]["non_embedding"], abs=8 * 32)
    assert all(a["heldout_loss"] > b["heldout_loss"] for a, b in zip(runs[::2], runs[1::2], strict=False)), "more data"
    rates = [max(row["learning_rate"] for row in run["history"]) for run in runs]
    assert rates[4] == pytest.approx(rates[0] * (8 / 24) ** 0.5, rel=0.1), "falls with the width"
    fit = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert fit["next"]["measured"] == runs[-1]["heldout_loss"]
    assert result.metrics["predicted_loss"] == fit["next"]["loss"]
    report = (tmp_path / "out" / "report.html").read_text()
    assert "predicted loss" in report
    assert "<svg" in report
    trained.clear()
    again = run_stage(options(), inputs, tmp_path)
    assert again.metrics == result.metrics
    assert not trained, "nothing was trained again"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sizes": {"a": SIZES["a"], "b": SIZES["b"]}}, "too few runs"),
        ({"sizes": {**SIZES, "next": SIZES["a"]}}, "a size is named next"),
        ({"predict": None}, "no next size to verify"),
        ({"sizes": {**SIZES, "d": {"preset": "llama-2m", "hidden_size": 130}}}, "do not divide hidden_size 130"),
    ],
)
def test_ladders_that_cannot_be_fitted_are_refused(tokens: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        ScalingStage().check(plan(options(**changes), {"tokens": artifact(tokens, "tokenize")}))


def test_the_estimate_adds_the_runs_up(tokens: Path) -> None:
    estimate = ScalingStage().estimate(plan(options(), {"tokens": artifact(tokens, "tokenize")}))
    assert "6 runs" in estimate.notes
    assert estimate.seconds is not None
    assert (estimate.tokens or 0) > 6 * 6 * 500
