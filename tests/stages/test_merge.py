"""Stage `merge`: folders in, one model out, and configurations that cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy
from training_stage import artifact, plan, run_stage

from modelyard.errors import RecipeError
from modelyard.models import export_model, load_model
from modelyard.stages.merge import MergeOptions, MergeStage
from modelyard.storage import Artifact


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A model and two that were trained from it: a little of everything, and one matrix alone."""
    base = write_policy(tmp_path_factory.mktemp("base"))
    found = {"base": artifact(base.parent, "finetune")}
    for number, name in enumerate(("first", "second")):
        model = load_model(base)
        state = dict(model.state_dict())
        generator = torch.Generator().manual_seed(number)
        for key in list(state) if number == 0 else ["model.layers.0.mlp.up_proj.weight"]:
            state[key] = state[key] + 0.1 * torch.randn(state[key].shape, generator=generator)
        state.pop("lm_head.weight", None)  # tied
        folder = tmp_path_factory.mktemp(name)
        export_model(model.config, state, folder / "model", base)
        found[name] = artifact(folder, "align")
    return found


def options(**changes: Any) -> MergeOptions:
    return MergeOptions.model_validate({"kind": "merge", **changes})


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_merged_model_is_a_model(models: dict[str, Artifact], tmp_path: Path, method: str) -> None:
    inputs = {name: models[name] for name in (("base",) if method == "ties" else ()) + ("first", "second")}
    chosen = options(method=method, density=1.0, weights={"second": 3.0})
    result = run_stage(chosen, dict(inputs), tmp_path)
    states = {n: load_model(Path(a.uri) / "model").state_dict() for n, a in models.items()}
    merged: Any = load_model(tmp_path / "out" / "model")
    assert result.counts["models"] == 2
    name = "model.layers.1.mlp.up_proj.weight"  # the second model did not change it
    base, first = states["base"][name], states["first"][name]
    if method == "linear":
        assert torch.allclose(merged.state_dict()[name], 0.25 * first + 0.75 * base, atol=1e-6)
    if method == "ties":
        assert torch.allclose(merged.state_dict()[name], first, atol=1e-6)
    assert merged(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert (tmp_path / "out" / "model" / "tokenizer.json").exists()


@pytest.mark.parametrize(
    ("names", "changes", "complaint"),
    [
        (["first"], {}, "two models at least, here are 1"),
        (["first", "second", "third"], {"method": "slerp"}, "two models, here are 3"),
        (["first", "second"], {"method": "ties"}, "needs the input base"),
        (["first", "second", "base"], {}, "needs the input base"),
        (["first", "second"], {"weights": {"frist": 1.0}}, "weight of 'frist'"),
        (["first", "second"], {"weights": {"first": -1.0}}, "weight of 'first'"),
    ],
)
def test_configurations_that_cannot_be(
    models: dict[str, Artifact], names: list[str], changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(RecipeError, match=complaint):
        MergeStage().check(plan(options(**changes), {name: models.get(name, models["first"]) for name in names}))
