"""Finished stage runs of a root, whatever recipe they belong to: what calibration and scaling fits read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from modelyard.tracking.sink import KIND, RECIPE, STAGE, run_tags
from modelyard.tracking.store import connect, find_store, translated

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_PAGE = 500


@dataclass(frozen=True)
class FinishedRun:
    """One stage that ended well. `metrics` holds the last value of each."""

    id: str
    recipe: str
    stage: str
    kind: str
    ended: datetime
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


class History:
    """Reads the store of a root; an empty one when nothing was tracked under it.

    Args:
        root: the recipes' root, local or s3://.
        uri: MLflow tracking URI; None = `MLFLOW_TRACKING_URI`, else the store under the root.

    Raises:
        StorageError: MLflow cannot be reached.
    """

    def __init__(self, root: str, uri: str | None = None) -> None:
        store = find_store(root, uri)
        self._place = store.uri
        empty = store.embedded and not (store.folder / "mlflow.db").exists()
        self._client: MlflowClient | None = None if empty else connect(store)

    def finished(self, kinds: Sequence[str]) -> list[FinishedRun]:
        """Runs of stages of these kinds that finished, oldest first. Raises StorageError."""
        return sorted(self._search(kinds), key=lambda run: run.ended)

    def curve(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric of one run, steps rising. Raises StorageError."""
        if self._client is None:
            return []
        with translated(self._place):
            found = {point.step: float(point.value) for point in self._client.get_metric_history(run_id, metric)}
        return sorted(found.items())

    def _search(self, kinds: Sequence[str]) -> Iterator[FinishedRun]:
        if self._client is None:
            return
        with translated(self._place):
            experiments = [e.experiment_id for e in self._client.search_experiments()]
            for kind in kinds:
                token: str | None = None
                query = f"attributes.status = 'FINISHED' and tags.`{KIND}` = '{kind}'"
                while experiments and (token is None or token):
                    page = self._client.search_runs(experiments, query, max_results=_PAGE, page_token=token)
                    yield from (_finished(run) for run in page)
                    token = page.token or ""


def _finished(run: Any) -> FinishedRun:
    tags = run_tags(run)
    ended = datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC)
    return FinishedRun(
        run.info.run_id, tags.get(RECIPE, ""), tags.get(STAGE, ""), tags.get(KIND, ""), ended,
        dict(run.data.metrics), tags,
    )  # fmt: skip
