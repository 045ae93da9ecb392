"""Registers a model under a name with its lineage, and promotes it when its evaluation allows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from modelyard.errors import DataError, RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import NAME, Options, StageOptions
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.storage import Artifact, join, write_bytes

REFUSED_ALIAS = "candidate"
_RESERVED = ("latest",)


class GateOptions(Options):
    """A bound on one metric of the evaluation."""

    metric: str = Field(description="name of a metric in the evaluation, such as heldout_loss")
    min: float | None = Field(None, description="smallest value that is promoted, in the metric's unit; null = none")
    max: float | None = Field(None, description="largest value that is promoted, in the metric's unit; null = none")

    @model_validator(mode="after")
    def _bounded(self) -> GateOptions:
        if self.min is None and self.max is None:
            raise ValueError("a gate needs min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self

    def refusal(self, value: float) -> str | None:
        """Why a value is not promoted, or None. A value that is not a number never is."""
        if self.min is not None and not value >= self.min:
            return f"{self.metric} {value:.4g} is not at least {self.min:.4g}"
        if self.max is not None and not value <= self.max:
            return f"{self.metric} {value:.4g} is not at most {self.max:.4g}"
        return None


class RegisterOptions(StageOptions):
    """Options of the register stage."""

    kind: Literal["register"] = Field("register", description="stage kind")
    name: str | None = Field(None, description="name of the registered model; null = the recipe's name")
    alias: str = Field("champion", description="alias the version gets; `candidate` when the gate refuses it")
    gate: GateOptions | None = Field(None, description="bound on a metric of the evaluation; null = always promote")

    @field_validator("name", "alias")
    @classmethod
    def _plain(cls, value: str | None) -> str | None:
        if value is None:
            return None
        if not NAME.match(value):
            raise ValueError(f"{value!r}: use lower-case letters, digits, - and _, at most 48")
        if value in _RESERVED or (value[0] == "v" and value[1:].isdigit()):
            raise ValueError(f"{value!r} is reserved by MLflow")
        return value


class RegisterStage(Stage[RegisterOptions]):
    """A model version in MLflow that points at the model's folder; nothing is copied."""

    kind = "register"
    Options = RegisterOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=("finetune", "pretrain", "align", "merge")),
        "evaluation": InputSpec(kinds=("evaluate",), required=False),
    }

    def check(self, ctx: PlanContext[RegisterOptions]) -> None:
        gate = ctx.options.gate
        if gate is None:
            return
        if "evaluation" not in ctx.options.inputs:
            raise RecipeError(
                "a gate needs an evaluation to look at",
                place=f"{ctx.name}.gate",
                mend=f"add `evaluation: <name of an evaluate stage>` to the inputs of {ctx.name}",
            )
        evaluation = ctx.inputs.get("evaluation")
        if isinstance(evaluation, Artifact):
            _gated_value(gate, evaluation, ctx.name)

    def estimate(self, ctx: PlanContext[RegisterOptions]) -> Estimate:
        return Estimate(seconds=1.0)

    def demand(self, options: RegisterOptions) -> dict[str, float]:
        return {}  # a few rows in a database, from the driver

    def run(self, ctx: StageContext[RegisterOptions]) -> StageResult:
        from modelyard.tracking import register

        model = ctx.artifact("model")
        evaluation = ctx.artifact("evaluation") if "evaluation" in ctx.inputs else None
        refusal = _refusal(ctx, evaluation)
        version = register(
            ctx.options.name or ctx.recipe,
            model.join("model"),
            root=ctx.root,
            fingerprint=model.manifest.fingerprint,
            alias=REFUSED_ALIAS if refusal else ctx.options.alias,
            tags=_lineage(ctx.recipe, model, evaluation) | {"refused": refusal or ""},
            run_id=ctx.run.id,
        )
        entry = {"name": version.name, "version": version.version, "alias": version.alias, "uri": version.uri}
        write_bytes(join(ctx.output, "registration.json"), (json.dumps(entry, indent=1) + "\n").encode())
        ctx.run.set_tags({"model": f"models:/{version.name}/{version.version}", "alias": version.alias})
        summary = f"{version.name} version {version.version} is {version.alias}"
        if refusal:
            ctx.progress.say(f"[yellow]not promoted to {ctx.options.alias}[/]: {refusal}")
            summary += f", not {ctx.options.alias}: {refusal}"
        return StageResult(summary, extra=entry)


def _refusal(ctx: StageContext[RegisterOptions], evaluation: Artifact | None) -> str | None:
    gate = ctx.options.gate
    if gate is None or evaluation is None:
        return None
    return gate.refusal(_gated_value(gate, evaluation, ctx.name))


def _gated_value(gate: GateOptions, evaluation: Artifact, stage: str) -> float:
    metrics = evaluation.manifest.metrics
    if gate.metric not in metrics:
        raise DataError(
            f"the evaluation has no metric {gate.metric!r}",
            place=f"{stage}.gate.metric",
            mend=f"use one of: {', '.join(sorted(metrics)) or 'none were measured'}",
        )
    return metrics[gate.metric]


def _lineage(recipe: str, model: Artifact, evaluation: Artifact | None) -> dict[str, object]:
    """Tags that lead from a version back to what made it, and forward to how good it is."""
    made = model.manifest
    tags: dict[str, object] = {
        "recipe": recipe,
        "stage": made.stage,
        "kind": made.kind,
        "artifact": model.uri,
        "code_version": made.code_version,
        "model_run": made.run_id or "",
    }
    tags |= {f"input.{name}": f"{e.stage or e.uri}@{e.fingerprint[:12]}" for name, e in made.inputs.items()}
    for source in (model, evaluation) if evaluation else (model,):
        tags |= {f"metric.{source.manifest.kind}.{k}": f"{v:.6g}" for k, v in source.manifest.metrics.items()}
    if evaluation:
        tags["evaluation"] = f"{evaluation.stage}@{evaluation.manifest.fingerprint[:12]}"
    return tags
