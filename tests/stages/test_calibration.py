"""What finished runs teach: cost model, scaling law, early stopping, all from a real MLflow store."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from modelyard.errors import DataError
from modelyard.planner import Layout, count, estimate_training, find_hardware, step_time
from modelyard.planner.choose import llama_shape
from modelyard.planner.scaling import Chinchilla
from modelyard.stages.calibration import advice, calibrate, calibrated, scaling_runs
from modelyard.stages.spending import log_prediction
from modelyard.stages.whatif import own_law, within
from modelyard.tracking import Tracker

TRUTH = Chinchilla(E=1.5, A=200.0, B=300.0, alpha=0.3, beta=0.3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root whose store holds nine runs of three sizes, timed on a machine unlike the table's."""
    root = tmp_path_factory.mktemp("learnt")
    truth = replace(find_hardware(None), efficiency=0.37, bandwidth=6e9)
    with Tracker(str(root), "sweep") as tracker:
        parent = tracker.start_recipe({}, {}, "f" * 64)
        for i, size in enumerate((2e6, 6e6, 2e7)):
            config = llama_shape(size, 4096, 256)
            for j, tokens in enumerate((2e6, 1e7, 5e7)):
                run = tracker.start_stage(parent, f"base{i}{j}", "pretrain", {}, {}, f"{i}{j}" * 32)
                layout = Layout(micro_batch=4 * (j + 1))
                estimate = estimate_training(config, tokens, 256, 4 * (j + 1), layout=layout)
                log_prediction(run, estimate)
                step = step_time(config, sequence_length=256, global_batch=4 * (j + 1), hardware=truth, layout=layout)
                parameters = count(config).total
                run.log_metrics({
                    "parameters": parameters, "step_seconds": step.seconds, "loss": 9.0,
                })  # fmt: skip
                for k, seen in enumerate(np.geomspace(tokens / 16, tokens, 8)):
                    run.log_metrics({"tokens": seen, "heldout_loss": TRUTH.loss(parameters, seen)}, step=k + 1)
                # The stage's totals, as the runner logs them.
                run.log_metrics({"tokens": tokens, "heldout_loss": TRUTH.loss(parameters, tokens)})
                run.end()
        parent.end()
    return root


def test_calibration_finds_the_machine_and_later_predictions_use_it(root: Path) -> None:
    assert calibrated(str(root), None).efficiency == find_hardware(None).efficiency
    (fitted,) = calibrate(str(root))
    assert fitted.result.efficiency == pytest.approx(0.37, rel=0.02)
    assert fitted.result.runs == 9 and fitted.result.max_error < 0.02
    assert all(
        abs(after / measured - 1) < 0.02 < abs(before / measured - 1) for _, measured, before, after in fitted.runs
    )
    hw = calibrated(str(root), None, 2.0)
    assert hw.efficiency == pytest.approx(0.37, rel=0.02) and hw.bandwidth == pytest.approx(6e9, rel=0.02)
    assert calibrated(str(root), "h100") == find_hardware("h100")
    assert json.loads((root / "calibration.json").read_text())["devices"][0]["runs"] == 9


def test_the_law_of_the_roots_own_runs(root: Path) -> None:
    runs = scaling_runs(str(root))
    assert len(runs) == 9
    fit = own_law(str(root))
    assert fit is not None
    middle, low, high = fit.predict(5e7, 1e9)
    assert middle == pytest.approx(TRUTH.loss(5e7, 1e9), rel=0.02) and low <= middle <= high
    options = {"budget": None, "hours": 1.0, "shape": None, "hardware": None, "devices": None, "spot": False}
    own = within(**options, root=str(root), fixed=False, own=True)  # type: ignore[arg-type]
    assert own.loss == pytest.approx(fit.law.loss(own.parameters, own.tokens))


def test_advice_says_whether_going_on_pays(root: Path) -> None:
    found = dict(advice(str(root)))
    assert len(found) == 9
    assert all("next doubling buys" in a.text and not a.stop for a in found.values())


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="measured steps"):
        calibrate(str(tmp_path))
    assert scaling_runs(str(tmp_path)) == [] and own_law(str(tmp_path)) is None
    with pytest.raises(DataError, match="fewer than"):
        within(budget=None, hours=1.0, shape=None, hardware=None, devices=None, root=str(tmp_path), spot=False,
               fixed=False, own=True)  # fmt: skip


def test_a_basis_survives_json() -> None:
    from modelyard.planner.calibrate import measurement

    layout = Layout(data=2, shard=2, micro_batch=4, recompute="full")
    estimate = estimate_training(llama_shape(4e6, 4096), 1e6, 128, 8, 2, layout=layout)
    assert estimate.basis is not None
    back = measurement(json.loads(json.dumps(estimate.basis)), 0.5)
    assert back.layout == layout and count(back.config) == count(estimate.basis["config"]) and back.seconds == 0.5
    with pytest.raises(DataError, match="basis"):
        measurement({**estimate.basis, "layout": asdict(layout) | {"unheard_of": 1}}, 0.5)
