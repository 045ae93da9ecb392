"""The learning-rate range test of a recipe's pre-training stage: its own model, tokens, batch and optimizer, here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from modelyard.errors import RecipeError
from modelyard.recipe import Recipe
from modelyard.stages.base import PlanContext
from modelyard.stages.graph import anchored, plan_context, plan_graph
from modelyard.stages.pretrain import PretrainOptions, PretrainStage, job_places
from modelyard.storage import join
from modelyard.train.options import ParallelOptions

if TYPE_CHECKING:
    from modelyard.train.range_test import RangeResult


def range_test_of(
    recipe: Recipe, stage: str | None, lowest: float, highest: float, steps: int
) -> tuple[RangeResult, str]:
    """Runs the test in this process, on one worker's share of everything; returns the result and the page's URI.

    Args:
        recipe: with a pre-training stage.
        stage: its name; None = the only one.
        lowest, highest: ends of the range of rates.
        steps: optimizer steps between them.

    Raises:
        RecipeError: there is no such stage, or its inputs have not been made yet.
        DataError: the loss never fell, or tokens and model do not fit.
    """
    import torch

    from modelyard.train.range_test import RangeTest, range_test
    from modelyard.train.world import current

    recipe = anchored(recipe)
    ctx = _context(recipe, stage)
    PretrainStage().check(ctx)
    torch.set_num_threads(max(1, int(ctx.options.resources.cpus_per_worker)))
    output = join(recipe.root, "range-tests", ctx.name)
    test = RangeTest.model_validate(
        {"job": _job(ctx, output), "lowest": lowest, "highest": highest, "steps": steps}
    )  # fmt: skip
    return range_test(test, current()), join(output, "range_test.html")


def _context(recipe: Recipe, stage: str | None) -> PlanContext[PretrainOptions]:
    planned = plan_graph(recipe)
    known = [e.node.name for e in planned if isinstance(e.node.options, PretrainOptions)]
    if stage not in known and not (stage is None and len(known) == 1):
        raise RecipeError(
            f"{stage!r} is no pre-training stage" if stage else f"there are {len(known)} pre-training stages",
            place=recipe.name,
            mend=f"--stage: {', '.join(known)}" if known else "give a recipe with a stage of kind pretrain",
        )
    entry = next(e for e in planned if e.node.name == (stage or known[0]))
    ctx = plan_context(recipe, entry, {e.node.name: e.artifact for e in planned if e.artifact})
    missing = sorted(set(ctx.options.inputs) - set(ctx.inputs))
    if missing:
        made = ", ".join(str(entry.node.after.get(name, name)) for name in missing)
        raise RecipeError(
            f"the inputs of {ctx.name} are not there yet: {made}",
            place=f"stages.{ctx.name}.inputs",
            mend=f"run the recipe --to {made} first",
        )
    return cast(PlanContext[PretrainOptions], ctx)


def _job(ctx: PlanContext[PretrainOptions], output: str) -> Mapping[str, object]:
    from modelyard.stages.train_worker import bring

    train = ctx.options.training().model_copy(update={"parallel": ParallelOptions()})
    brought = {name: bring(place) for name, place in job_places(ctx).items()}
    return {"output": output, "train": train, "model": ctx.options.model, **brought}
