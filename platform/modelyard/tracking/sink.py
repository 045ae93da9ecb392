"""Applies events to MLflow: finds or creates the run, groups values into as few calls as possible."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.tracking.run import Event, this_process
from modelyard.tracking.store import Store, translated

if TYPE_CHECKING:
    from mlflow.entities import Experiment
    from mlflow.tracking import MlflowClient

UID, OWNER, HEARTBEAT = "modelyard.uid", "modelyard.owner", "modelyard.heartbeat"
STAGE, KIND, FINGERPRINT, RECIPE = "modelyard.stage", "modelyard.kind", "modelyard.fingerprint", "modelyard.recipe"
PARENT = "mlflow.parentRunId"
LARGEST_FILE = 64 << 20
_TRAINING = {"mlflow.experimentKind": "custom_model_development"}  # else the UI opens its pages for agents
_METRICS_A_CALL, _PARAMS_A_CALL = 1000, 100


class Sink:
    """Writes events to one MLflow store. Not thread-safe per run: callers hold the run's lock."""

    def __init__(self, client: MlflowClient, store: Store) -> None:
        self.client, self.store = client, store
        self._params: dict[str, dict[str, str]] = {}

    def apply(self, run_id: str | None, events: Sequence[Event]) -> str:
        """Sends `events` in order; a `start` event finds or makes the run. Returns the run's id.

        Raises:
            Unreachable: MLflow went away; sending the same events again later is safe.
            Refused: MLflow does not take one of them.
        """
        with translated(self.store.uri):
            batch: list[Event] = []
            for item in events:
                if item["event"] in ("params", "metrics", "tags"):
                    batch.append(item)
                    continue
                if batch:
                    self._log(_known(run_id), batch)
                    batch = []
                run_id = self._single(run_id, item)
            if batch:
                self._log(_known(run_id), batch)
            return _known(run_id)

    def _single(self, run_id: str | None, item: Event) -> str:
        if item["event"] == "start":
            return run_id or self._start(item)
        run_id = _known(run_id)
        match item["event"]:
            case "text":
                self.client.log_text(run_id, item["text"], item["name"])
            case "file":
                self._file(run_id, item)
            case "inputs":
                self._inputs(run_id, item)
            case "end":
                self.client.set_terminated(run_id, item["status"], end_time=item["time"])
        return run_id

    def experiment(self, name: str) -> str:
        """The id of an experiment, made or restored when needed."""
        from mlflow.exceptions import MlflowException

        found: Experiment | None = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=self.store.artifacts, tags=_TRAINING))
            except MlflowException:  # somebody else made it in between
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def find(self, experiment: str, uid: str) -> str | None:
        """The id of the run with a uid, or None."""
        found = self.client.search_runs([experiment], f"tags.`{UID}` = '{uid}'", max_results=1)
        return str(found[0].info.run_id) if found else None

    def _start(self, item: Event) -> str:
        experiment = self.experiment(item["experiment"])
        run_id = self._existing(item.get("existing")) or self.find(experiment, item["uid"])
        parent = item.get("parent_id") or (item.get("parent_uid") and self.find(experiment, item["parent_uid"]))
        tags = {OWNER: item["owner"], **item.get("tags", {})} | ({PARENT: parent} if parent else {})
        if run_id is None:
            made = self.client.create_run(
                experiment, start_time=item["time"], tags={UID: item["uid"], **tags}, run_name=item["name"]
            )
            return str(made.info.run_id)
        self.client.update_run(run_id, status="RUNNING")
        self._log(run_id, [{"event": "tags", "time": item["time"], "values": {"modelyard.resumed": "true", **tags}}])
        return run_id

    def _existing(self, run_id: str | None) -> str | None:
        """`run_id` if the store still has that run."""
        from mlflow.exceptions import MlflowException

        try:
            return run_id if run_id and self.client.get_run(run_id).info.lifecycle_stage == "active" else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _log(self, run_id: str, batch: Iterable[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        metrics: list[Metric] = []
        params: dict[str, str] = {}
        tags: dict[str, str] = {}
        for item in batch:
            if item["event"] == "metrics":
                metrics += [Metric(k, v, item["time"], item["step"]) for k, v in item["values"].items()]
            else:
                (params if item["event"] == "params" else tags).update(item["values"])
        fresh, changed = self._split(run_id, params)
        tags |= changed
        new = [Param(k, v) for k, v in fresh.items()]
        labels = [RunTag(k, v) for k, v in tags.items()]
        for i in range(0, max(len(new), len(labels)), _PARAMS_A_CALL):
            part = slice(i, i + _PARAMS_A_CALL)
            self.client.log_batch(run_id, params=new[part], tags=labels[part])
        for i in range(0, len(metrics), _METRICS_A_CALL):
            self.client.log_batch(run_id, metrics=metrics[i : i + _METRICS_A_CALL])
        self._params.setdefault(run_id, {}).update(fresh)

    def _split(self, run_id: str, params: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """New parameters, and tags for those whose value changed: MLflow refuses to overwrite a parameter."""
        if not params:
            return {}, {}
        if run_id not in self._params:
            self._params[run_id] = dict(self.client.get_run(run_id).data.params)
        known = self._params[run_id]
        changed = {f"modelyard.changed.{k}"[:250]: v for k, v in params.items() if known.get(k, v) != v}
        return {k: v for k, v in params.items() if k not in known}, changed

    def _inputs(self, run_id: str, item: Event) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = [
            DatasetInput(
                Dataset(entry["name"], entry["digest"][:36], "modelyard", json.dumps({"uri": entry["uri"]}),
                        profile=json.dumps(entry["profile"])),
                [InputTag("mlflow.data.context", entry["context"])],
            )
            for entry in item["values"]
        ]  # fmt: skip
        self.client.log_inputs(run_id, datasets)

    def _file(self, run_id: str, item: Event) -> None:
        source, name = Path(item["path"]), Path(item["name"])
        if source.stat().st_size > LARGEST_FILE:
            self.client.set_tag(run_id, f"modelyard.file.{name.name}"[:250], str(source))
            return
        folder = None if name.parent == Path() else name.parent.as_posix()
        with tempfile.TemporaryDirectory() as scratch:  # MLflow keeps the local file's name
            renamed = Path(scratch) / name.name
            shutil.copyfile(source, renamed)
            self.client.log_artifact(run_id, str(renamed), folder)

    def beat(self, run_id: str, time_ms: int) -> None:
        """Says that the process that writes this run is alive."""
        with translated(self.store.uri):
            self.client.set_tag(run_id, HEARTBEAT, str(time_ms))
            self.client.set_tag(run_id, OWNER, this_process())


def _known(run_id: str | None) -> str:
    if run_id is None:
        raise ValueError("the first event of a run must be `start`")
    return run_id


def run_tags(run: Any) -> dict[str, str]:
    """Tags of an MLflow run entity."""
    return dict(run.data.tags)
