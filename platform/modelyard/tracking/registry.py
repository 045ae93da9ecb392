"""The model registry: versions that point at model folders by reference, and aliases.

No weights are copied. A version's MLflow model is a few small files (MLmodel with a `python_function`
flavor, requirements.txt) that name the folder; `mlflow.pyfunc.load_model("models:/name@champion")`
loads it where modelyard is installed, and the folder itself is an ordinary Hugging Face model.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError
from modelyard.storage.uri import absolute, is_remote
from modelyard.tracking.aliases import Aliases
from modelyard.tracking.pyfunc import NEW_TOKENS
from modelyard.tracking.redact import flatten
from modelyard.tracking.sink import FINGERPRINT, Sink
from modelyard.tracking.store import Store, connect, find_store, translated

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

URI = "modelyard.uri"
REFERENCE = "reference.json"
_REQUIREMENTS = ("modelyard", "torch", "transformers", "safetensors")
_SCHEME = "models:/"


@dataclass(frozen=True)
class ModelVersion:
    """One registered version. `uri` is the folder of the model, `tags` its lineage."""

    name: str
    version: int
    uri: str
    alias: str | None
    tags: Mapping[str, str]


class Registry:
    """The registry of a root's store.

    Raises:
        StorageError: MLflow cannot be reached.
    """

    def __init__(self, root: str, uri: str | None = None) -> None:
        self.store: Store = find_store(root, uri)
        self.client: MlflowClient = connect(self.store)

    def register(
        self,
        name: str,
        model_uri: str,
        *,
        fingerprint: str,
        alias: str = "champion",
        tags: Mapping[str, Any] | None = None,
        run_id: str | None = None,
    ) -> ModelVersion:
        """Registers a model folder; the same fingerprint again is the same version.

        Args:
            name: registered model.
            model_uri: Hugging Face folder, local or s3://.
            fingerprint: what made the model: decides whether it is known already.
            alias: alias to point at the version.
            tags: lineage: recipe, stage fingerprints, code version, metrics.
            run_id: MLflow run the version belongs to.

        Raises:
            StorageError: MLflow cannot be reached or refuses.
        """
        where = absolute(model_uri)
        labels = {FINGERPRINT: fingerprint, URI: where, **flatten(tags or {})}
        with translated(self.store.uri):
            self._ensure(name)
            number = self._known(name, fingerprint)
            if number is None:
                number = self._create(name, where, labels, run_id)
            else:
                for key, value in labels.items():
                    self.client.set_model_version_tag(name, str(number), key, value)
        Aliases(self).move(name, alias, number, f"registered by run {run_id}" if run_id else "registered")
        return ModelVersion(name, number, where, alias, labels)

    def resolve(self, reference: str) -> ModelVersion:
        """The version that `models:/name@alias` or `models:/name/3` names.

        Raises:
            DataError: the reference is malformed or names nothing.
            StorageError: MLflow cannot be reached.
        """
        name, alias, number = _parse(reference)
        from mlflow.exceptions import MlflowException

        with translated(self.store.uri):
            try:
                if alias:
                    found = self.client.get_model_version_by_alias(name, alias)
                else:
                    found = self.client.get_model_version(name, number)
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
                raise DataError(
                    "no such registered model", place=f"{reference} in {self.store.uri}",
                    mend="run a recipe with a register stage, or name a version that `modelyard ui` shows",
                ) from error  # fmt: skip
        tags = dict(found.tags)
        return ModelVersion(name, int(found.version), tags.get(URI, str(found.source)), alias or None, tags)

    def versions(self, name: str) -> list[ModelVersion]:
        """All versions of a model, newest first."""
        with translated(self.store.uri):
            found = self.client.search_model_versions(f"name='{name}'", max_results=10_000)
        made = [ModelVersion(name, int(v.version), v.tags.get(URI, str(v.source)), None, dict(v.tags)) for v in found]
        return sorted(made, key=lambda v: v.version, reverse=True)

    def _known(self, name: str, fingerprint: str) -> int | None:
        return next((v.version for v in self.versions(name) if v.tags.get(FINGERPRINT) == fingerprint), None)

    def _ensure(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _create(self, name: str, where: str, labels: Mapping[str, str], run_id: str | None) -> int:
        experiment = (
            str(self.client.get_run(run_id).info.experiment_id)
            if run_id
            else Sink(self.client, self.store).experiment(name)
        )
        logged = self.client.create_logged_model(
            experiment, name, source_run_id=run_id, tags=dict(labels), model_type="causal-lm"
        )
        with tempfile.TemporaryDirectory() as scratch:
            _write_mlflow_model(Path(scratch), where, labels, run_id, logged.model_id)
            self.client.log_model_artifacts(logged.model_id, scratch)
        self.client.finalize_logged_model(logged.model_id, "READY")
        # In process, MLflow looks logged models up in its global store instead of this one, both for
        # `models:/<id>` and for a version without a run; a server in turn refuses plain paths as sources.
        remote = self.store.remote
        made = self.client.create_model_version(
            name,
            f"{_SCHEME}{logged.model_id}" if remote else logged.artifact_location,
            run_id=run_id,
            tags=dict(labels),
            model_id=logged.model_id if remote or run_id else None,
        )
        return int(made.version)


def register(name: str, model_uri: str, *, root: str, uri: str | None = None, **options: Any) -> ModelVersion:
    """:meth:`Registry.register` in the store of `root`."""
    return Registry(root, uri).register(name, model_uri, **options)


def resolve(reference: str, *, root: str, uri: str | None = None) -> tuple[str, int]:
    """Folder URI and version number of `models:/name@alias` or `models:/name/3` in the store of `root`."""
    found = Registry(root, uri).resolve(reference)
    return found.uri, found.version


def _parse(reference: str) -> tuple[str, str, str]:
    """Name, alias and version number of a reference; one of the last two is empty."""
    body = reference.removeprefix(_SCHEME)
    name, at, alias = body.partition("@")
    if reference.startswith(_SCHEME) and at and name and alias:
        return name, alias, ""
    name, slash, number = body.rpartition("/")
    if reference.startswith(_SCHEME) and slash and name and number.isdigit():
        return name, "", number
    raise DataError(
        f"{reference!r} does not name a registered model", mend="write models:/name@alias or models:/name/3"
    )


def _write_mlflow_model(folder: Path, where: str, labels: Mapping[str, str], run_id: str | None, model_id: str) -> None:
    from mlflow import pyfunc
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    text = Schema([ColSpec(DataType.string)])
    length = ParamSchema([ParamSpec("max_new_tokens", DataType.integer, NEW_TOKENS)])
    signature = ModelSignature(text, text, length)
    model = Model(
        run_id=run_id, model_id=model_id, signature=signature, metadata={"uri": where, **_short(labels)},
        model_size_bytes=_size(where),
    )  # fmt: skip
    pyfunc.add_to_model(
        model, loader_module="modelyard.tracking.pyfunc", data=REFERENCE, python_env={"virtualenv": "python_env.yaml"}
    )
    model.save(str(folder / "MLmodel"))
    (folder / REFERENCE).write_text(json.dumps({"uri": where}) + "\n")
    # Written out, because MLflow's own inference of requirements loads the model and asks the network.
    pins = [f"{package}=={installed(package)}" for package in _REQUIREMENTS]
    (folder / "requirements.txt").write_text("\n".join(pins) + "\n")
    (folder / "python_env.yaml").write_text("python: '3.11'\ndependencies:\n- -r requirements.txt\n")


def _short(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if len(value) <= 200}


def _size(where: str) -> int | None:
    if is_remote(where):
        return None
    return sum(file.stat().st_size for file in Path(where).rglob("*") if file.is_file())
