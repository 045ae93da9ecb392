"""Recent executions of a recipe and their stages, as MLflow knows them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from modelyard.tracking.sink import FINGERPRINT, KIND, PARENT, STAGE, run_tags
from modelyard.tracking.store import connect, find_store, translated

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


@dataclass(frozen=True)
class StageRun:
    """One stage of one execution. `metrics` holds the last value of each."""

    id: str
    name: str
    kind: str
    status: str
    fingerprint: str
    started: datetime
    ended: datetime | None
    metrics: dict[str, float]

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return ((self.ended or datetime.now(UTC)) - self.started).total_seconds()


@dataclass(frozen=True)
class RecipeRun:
    """One execution of a recipe, with its stages in the order they started."""

    id: str
    recipe: str
    status: str
    fingerprint: str
    started: datetime
    ended: datetime | None
    stages: tuple[StageRun, ...]


def status(root: str, recipe: str, uri: str | None = None, limit: int = 10) -> list[RecipeRun]:
    """The latest executions of a recipe, newest first; none when it never ran.

    Raises:
        StorageError: MLflow cannot be reached.
    """
    store = find_store(root, uri)
    if store.embedded and not (store.folder / "mlflow.db").exists():
        return []
    client = connect(store)
    with translated(store.uri):
        experiment = client.get_experiment_by_name(recipe)
        if experiment is None:
            return []
        query = f"tags.`{FINGERPRINT}` != '' and attributes.run_name = '{recipe}'"
        order = ["attributes.start_time DESC"]
        runs = client.search_runs([experiment.experiment_id], query, order_by=order, max_results=limit)
        return [_recipe(client, experiment.experiment_id, recipe, run) for run in runs if STAGE not in run_tags(run)]


def _recipe(client: MlflowClient, experiment: str, recipe: str, run: Any) -> RecipeRun:
    found = client.search_runs(
        [experiment], f"tags.`{PARENT}` = '{run.info.run_id}'", order_by=["attributes.start_time ASC"], max_results=500
    )
    stages = tuple(_stage(child) for child in found)
    return RecipeRun(
        run.info.run_id, recipe, run.info.status, run_tags(run).get(FINGERPRINT, ""),
        _time(run.info.start_time), _time_or_none(run), stages,
    )  # fmt: skip


def _stage(run: Any) -> StageRun:
    tags = run_tags(run)
    return StageRun(
        run.info.run_id, tags.get(STAGE, run.info.run_name), tags.get(KIND, ""), run.info.status,
        tags.get(FINGERPRINT, ""), _time(run.info.start_time), _time_or_none(run), dict(run.data.metrics),
    )  # fmt: skip


def _time(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _time_or_none(run: Any) -> datetime | None:
    # A resumed run keeps the end of its first try until it ends again.
    ended = run.info.end_time
    return _time(ended) if ended and run.info.status != "RUNNING" else None
