"""The Python entrance: load, plan and run a recipe from a program or a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from modelyard.planner.estimate import Estimate
from modelyard.recipe import Recipe, load_recipe
from modelyard.stages import registry
from modelyard.stages.graph import Planned, anchored, plan_context, plan_graph
from modelyard.stages.runner import Outcome
from modelyard.stages.runner import run as _run
from modelyard.storage import Artifact


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan: `cached` says whether its artifact exists, `why` what makes it run again."""

    name: str
    kind: str
    fingerprint: str
    cached: bool
    why: tuple[str, ...]
    after: tuple[str, ...]
    estimate: Estimate


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe with every known stage kind. Raises RecipeError."""
    return load_recipe(path, registry.option_models(), overrides)


def plan(recipe: Recipe | str | Path, *, force: Sequence[str] = ()) -> list[StagePlan]:
    """What `run` would do, without doing it. Raises the ModelyardErrors of a recipe that cannot run."""
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    recipe = anchored(recipe)
    planned = plan_graph(recipe, frozenset(force))
    artifacts = {entry.node.name: entry.artifact for entry in planned if entry.artifact}
    return [_stage_plan(recipe, entry, artifacts) for entry in planned]


def _stage_plan(recipe: Recipe, entry: Planned, artifacts: dict[str, Artifact]) -> StagePlan:
    ctx = plan_context(recipe, entry, artifacts)
    if entry.artifact is None:
        entry.node.stage.check(ctx)
    return StagePlan(
        entry.node.name,
        entry.node.options.kind,
        entry.fingerprint,
        entry.artifact is not None,
        tuple(entry.why),
        tuple(entry.node.after.values()),
        entry.node.stage.estimate(ctx),
    )


def run(
    recipe: Recipe | str | Path, *, force: Sequence[str] = (), keep: bool = False, address: str | None = None
) -> Outcome:
    """Runs a recipe; see :func:`modelyard.stages.runner.run`."""
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    return _run(recipe, force=frozenset(force), keep=keep, address=address)
