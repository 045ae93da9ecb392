"""Learning from finished runs: the cost model's constants and scaling laws, from what a root's MLflow holds.

`calibrate` fits efficiency and bandwidth to the steps that training stages measured and keeps them in
`{root}/calibration.json`, where `calibrated` finds them for every later prediction of that root.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.training import several_cores
from modelyard.storage import absolute, exists, join, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.planner.calibrate import Calibration, Measurement
    from modelyard.planner.fitting import Advice
    from modelyard.planner.scaling import Run
    from modelyard.tracking import FinishedRun

FILE = "calibration.json"
TRAINING_KINDS = ("pretrain", "finetune")
RUNS = 50
"""Newest runs of one device that a calibration looks at: older ones may be of older code."""


@dataclass(frozen=True)
class Fitted:
    """The calibration of one kind of worker, and each of its runs as (name, measured, before, after) seconds a step."""

    hardware: str
    cores: float
    result: Calibration
    runs: tuple[tuple[str, float, float, float], ...]


def calibrated(root: str | None, name: str | None, cores: float = 1.0) -> Hardware:
    """A device as this root's own runs measured it; as the table has it where there are none.

    Args:
        root: recipes' root; None = only the table.
        name: in the hardware table; None = this machine.
        cores: of one CPU worker.

    Raises:
        RecipeError: unknown hardware.
    """
    hw = find_hardware(name)
    place = join(absolute(root), FILE) if root else None
    if place is None or not exists(place):
        return hw
    rows = [row for row in json.loads(read_bytes(place))["devices"] if row["hardware"] == hw.name]
    # The same number of cores where it was measured, else the nearest: they share the memory.
    row = min(rows, key=lambda row: abs(row["cores"] - cores), default=None)
    return hw if row is None else replace(hw, efficiency=row["efficiency"], bandwidth=row["bandwidth"])


def calibrate(root: str, uri: str | None = None) -> list[Fitted]:
    """Calibrates every kind of worker this root's training stages ran on and keeps the result in the root.

    Raises:
        DataError: no finished training run holds what a calibration needs.
        StorageError: MLflow cannot be reached.
    """
    found = [_fit(*key, runs) for key, runs in _measured(training_runs(root, uri)).items()]
    if not found:
        raise DataError(
            "no finished training run holds measured steps", place=root, mend="run a recipe that trains, then again"
        )
    rows = [
        {
            "hardware": f.hardware, "cores": f.cores, "efficiency": f.result.hardware.efficiency,
            "bandwidth": f.result.hardware.bandwidth, "runs": f.result.runs, "mean_error": f.result.mean_error,
            "max_error": f.result.max_error,
        }
        for f in found
    ]  # fmt: skip
    text = json.dumps({"made": datetime.now(UTC).isoformat(timespec="seconds"), "devices": rows}, indent=1)
    write_bytes(join(absolute(root), FILE), text.encode())
    return found


def training_runs(root: str, uri: str | None = None) -> list[FinishedRun]:
    """Finished stages that trained, oldest first. Raises StorageError when MLflow cannot be reached."""
    from modelyard.tracking import History

    return History(root, uri).finished(TRAINING_KINDS)


_Key = tuple[str, float]


def _measured(runs: Iterable[FinishedRun]) -> dict[_Key, list[tuple[str, Measurement]]]:
    """Measured runs by device and cores."""
    from modelyard.planner.calibrate import measurement

    found: dict[_Key, list[tuple[str, Measurement]]] = defaultdict(list)
    for run in runs:
        basis, seconds = _basis(run), run.metrics.get("step_seconds")
        if basis is None or not seconds:
            continue
        try:
            measured = measurement(basis, seconds)
        except DataError:
            continue  # of another version of the planner
        found[str(basis["hardware"]), float(basis["cores"])].append((f"{run.recipe}/{run.stage}", measured))
    return {key: rows[-RUNS:] for key, rows in found.items()}


def _basis(run: FinishedRun) -> Mapping[str, Any] | None:
    try:
        found = json.loads(run.tags.get("modelyard.basis", "null"))
    except ValueError:  # MLflow cuts tags above 8,000 characters
        return None
    return found if isinstance(found, dict) and {"hardware", "cores"} <= found.keys() else None


def _fit(name: str, cores: float, runs: list[tuple[str, Measurement]]) -> Fitted:
    from modelyard.planner.calibrate import calibrate as fit
    from modelyard.planner.calibrate import predicted

    hw = find_hardware(name)
    hw = several_cores(hw, cores) if hw.kind == "cpu" and hw.cores <= 1 else hw
    result = fit([m for _, m in runs], hw)
    rows = tuple((label, m.seconds, predicted(m, hw), predicted(m, result.hardware)) for label, m in runs)
    return Fitted(name, cores, result, rows)


def scaling_runs(root: str, uri: str | None = None) -> list[Run]:
    """Pre-training runs as points of a scaling law: parameters, tokens, held-out loss (nats a token).

    Raises StorageError when MLflow cannot be reached.
    """
    from modelyard.planner.scaling import Run

    names = ("parameters", "tokens", "heldout_loss")
    rows = [[run.metrics.get(name) for name in names] for run in training_runs(root, uri) if run.kind == "pretrain"]
    # A stage that ran again under the same options gives the same point: once is enough.
    return list(dict.fromkeys(Run(float(n), float(d), float(y)) for n, d, y in rows if n and d and y))


def advice(root: str, uri: str | None = None) -> list[tuple[str, Advice]]:
    """Early-stopping advice for each pre-training run whose held-out loss was evaluated on the way, newest last.

    Raises StorageError when MLflow cannot be reached.
    """
    from modelyard.planner.fitting import advise
    from modelyard.tracking import History

    history = History(root, uri)
    found = []
    for run in history.finished(("pretrain",)):
        tokens = dict(history.curve(run.id, "tokens"))
        losses = history.curve(run.id, "heldout_loss")
        # At step 0 the runner logs a stage's totals.
        points = [(tokens[step], loss) for step, loss in losses if step > 0 and tokens.get(step)]
        if len(points) >= 5:
            found.append((f"{run.recipe}/{run.stage}", advise(points)))
    return found
