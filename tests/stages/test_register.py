"""The register stage against an embedded MLflow store, on artifacts published as the runner does."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest
from pydantic import ValidationError
from rich.console import Console

from modelyard.errors import DataError, RecipeError
from modelyard.stages.base import PlanContext, StageContext, StageResult
from modelyard.stages.progress import Display, Progress
from modelyard.stages.register import GateOptions, RegisterOptions, RegisterStage
from modelyard.storage import Artifact, ArtifactStore, InputEntry, Manifest, join, write_bytes
from modelyard.tracking import Registry, SpoolRun, Tracker, resolve

INPUTS = {"model": "chat", "evaluation": "evaluation"}


def publish(root: Path, stage: str, kind: str, fingerprint: str, **metrics: float) -> Artifact:
    """A published artifact with a model folder."""
    draft = ArtifactStore(str(root)).draft(stage, fingerprint)
    write_bytes(join(draft.uri, "model", "config.json"), b"{}")
    now = datetime.now(UTC)
    manifest = Manifest(
        stage=stage, kind=kind, kind_version=1, fingerprint=fingerprint, recipe="demo", options={},
        inputs={"tokens": InputEntry(fingerprint="9" * 64, stage="tokens")}, code_version="0.1.0",
        started=now, ended=now, metrics=metrics,
    )  # fmt: skip
    return draft.publish(manifest)


def register(root: Path, options: RegisterOptions, *, model: str = "1" * 64, loss: float | None = 3.5) -> StageResult:
    """Runs the stage on a fine-tuned model and, with a loss, its evaluation."""
    inputs = {"model": publish(root, "chat", "finetune", model, train_loss=3.1)}
    if loss is not None:
        inputs["evaluation"] = publish(root, "evaluation", "evaluate", "2" * 64, heldout_loss=loss)
    display = Display(Console(file=io.StringIO()))
    draft = ArtifactStore(str(root)).draft("registered", "3" * 64)
    run = SpoolRun(root / "spooled")
    ctx = StageContext(
        "registered", "demo", options, "3" * 64, str(root), inputs, draft.uri, draft.work, run,
        Progress(display, "registered"),
    )  # fmt: skip
    result = RegisterStage().run(ctx)
    entry = json.loads((Path(draft.uri) / "registration.json").read_text())
    assert entry == dict(result.extra)
    return result


def plan(options: RegisterOptions, inputs: dict[str, Artifact] | None = None) -> PlanContext[RegisterOptions]:
    return PlanContext("registered", options, "demo", "/root", inputs or {}, {})


def test_a_model_gets_a_version_an_alias_and_its_lineage(tmp_path: Path) -> None:
    result = register(tmp_path, RegisterOptions(inputs=INPUTS))
    uri = str(tmp_path / "artifacts" / "chat-111111111111" / "model")
    assert dict(result.extra) == {"name": "demo", "version": 1, "alias": "champion", "uri": uri}
    assert resolve("models:/demo@champion", root=str(tmp_path)) == (uri, 1)
    tags = Registry(str(tmp_path)).resolve("models:/demo/1").tags
    assert tags["stage"] == "chat"
    assert tags["input.tokens"] == "tokens@999999999999"
    assert tags["code_version"] == "0.1.0"
    assert tags["metric.finetune.train_loss"] == "3.1"
    assert tags["metric.evaluate.heldout_loss"] == "3.5"
    assert tags["modelyard.fingerprint"] == "1" * 64


def test_the_same_model_again_is_the_same_version_and_another_the_next(tmp_path: Path) -> None:
    options = RegisterOptions(inputs={"model": "chat"}, name="assistant")
    versions = [register(tmp_path, options, model=m * 64, loss=None).extra["version"] for m in "1121"]
    assert versions == [1, 1, 2, 1]


def test_the_version_belongs_to_the_run_of_the_stage(tmp_path: Path) -> None:
    model = publish(tmp_path, "chat", "finetune", "1" * 64)
    with Tracker(str(tmp_path), "demo") as tracker:
        parent = tracker.start_recipe({}, {}, "a" * 64)
        run = tracker.start_stage(parent, "registered", "register", {}, {}, "b" * 64)
        registry = Registry(str(tmp_path))
        registry.register("demo", model.join("model"), fingerprint="1" * 64, run_id=run.id)
        run.end()
        parent.end()
        found = registry.client.get_model_version("demo", "1")
        assert found.run_id == run.id


@pytest.mark.parametrize(
    ("gate", "loss", "alias"),
    [
        (GateOptions(metric="heldout_loss", max=4.0), 3.5, "champion"),
        (GateOptions(metric="heldout_loss", max=4.0), 4.5, "candidate"),
        (GateOptions(metric="heldout_loss", min=3.0), 2.5, "candidate"),
    ],
)
def test_the_gate_decides_the_alias(tmp_path: Path, gate: GateOptions, loss: float, alias: str) -> None:
    result = register(tmp_path, RegisterOptions(inputs=INPUTS, gate=gate), loss=loss)
    assert result.extra["alias"] == alias
    assert ("heldout_loss" in result.summary) == (alias == "candidate")
    if alias == "candidate":
        with pytest.raises(DataError):
            resolve("models:/demo@champion", root=str(tmp_path))


def test_a_metric_that_is_not_a_number_is_never_promoted() -> None:
    for gate in (GateOptions(metric="heldout_loss", max=4.0), GateOptions(metric="heldout_loss", min=0.0)):
        assert gate.refusal(float("nan")) is not None


def test_a_refused_model_leaves_the_champion_in_place(tmp_path: Path) -> None:
    options = RegisterOptions(inputs=INPUTS, gate=GateOptions(metric="heldout_loss", max=4.0))
    assert register(tmp_path, options, model="1" * 64, loss=3.0).extra["alias"] == "champion"
    for folder in (tmp_path / "artifacts").glob("evaluation-*"):
        (folder / "manifest.json").unlink()
    assert register(tmp_path, options, model="4" * 64, loss=5.0).extra["alias"] == "candidate"
    assert resolve("models:/demo@champion", root=str(tmp_path))[1] == 1
    assert resolve("models:/demo@candidate", root=str(tmp_path))[1] == 2


def test_a_gate_without_an_evaluation_is_refused_before_work() -> None:
    options = RegisterOptions(inputs={"model": "chat"}, gate=GateOptions(metric="heldout_loss", max=4.0))
    with pytest.raises(RecipeError, match="needs an evaluation") as caught:
        RegisterStage().check(plan(options))
    assert caught.value.place == "registered.gate"


def test_a_misspelt_metric_is_refused_with_those_there_are(tmp_path: Path) -> None:
    evaluation = publish(tmp_path, "evaluation", "evaluate", "2" * 64, heldout_loss=3.0, bits_per_byte=1.5)
    options = RegisterOptions(inputs=INPUTS, gate=GateOptions(metric="heldout_los", max=4.0))
    with pytest.raises(DataError, match="heldout_los") as caught:
        RegisterStage().check(plan(options, {"evaluation": evaluation}))
    assert "bits_per_byte, heldout_loss" in caught.value.mend


@pytest.mark.parametrize(
    "bad",
    [
        {"alias": "Champion!"}, {"alias": "latest"}, {"alias": "v3"}, {"name": "my model"}, {"gate": {"metric": "x"}},
        {"gate": {"metric": "x", "min": 2, "max": 1}}, {"aliass": "champion"},
    ],
)  # fmt: skip
def test_bad_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RegisterOptions.model_validate({"inputs": {"model": "chat"}, **bad})
