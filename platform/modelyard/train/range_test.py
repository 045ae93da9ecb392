"""Learning-rate range test (Smith 2015, arXiv 1506.01186): the rate rises until the loss does, and the curve says why.

    {"range_test": {"job": {... a PretrainJob ...}, "lowest": 1e-6, "highest": 1.0, "steps": 100}}

as the file of `python -m modelyard.train`; it writes `range_test.html` below the job's `output`. One process.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from pydantic import Field

from modelyard import storage
from modelyard.errors import DataError, RecipeError
from modelyard.recipe.schema import Options
from modelyard.train.choose_objective import choose_objective
from modelyard.train.data import Feed, make_order
from modelyard.train.objective import checked
from modelyard.train.optimizer import make_optimizer, set_learning_rate
from modelyard.train.programs import PretrainJob, open_sides, pretraining_model
from modelyard.train.report import Line, Page
from modelyard.train.world import World

_KEEP = 0.9
_BROKEN = 1.3
"""Smoothing of the losses, and by how much the smoothed loss must exceed its best before the test ends."""


class RangeTest(Options):
    """A range test of a job's model, data, batch, objective and optimizer; budget and schedule are the test's own."""

    job: PretrainJob = Field(description="what to train; nothing but the page is written")
    lowest: float = Field(1e-6, gt=0, description="rate of the first step")
    highest: float = Field(1.0, gt=0, description="rate of the last step; in between they are evenly spaced in log")
    steps: int = Field(100, ge=10, description="optimizer steps at most")


@dataclass(frozen=True)
class RangeResult:
    """Points (rate, smoothed loss), the rate to use as peak, and the rate where the loss was lowest."""

    points: list[tuple[float, float]]
    suggestion: float
    lowest_at: float


def range_test(test: RangeTest, world: World) -> RangeResult:
    """Runs the test and writes its page.

    Raises:
        RecipeError: `highest` is not above `lowest`, or there is more than one process.
        DataError: tokens are missing or damaged, or the loss never fell.
    """
    if test.highest <= test.lowest or world.size > 1:
        raise RecipeError("a range test needs lowest < highest and one process", place="range_test")
    result = judge(_losses(test, world))
    place = storage.join(test.job.output, "range_test.html")
    storage.write_bytes(place, _page(test, result).html().encode())
    return result


def judge(points: list[tuple[float, float]]) -> RangeResult:
    """Smooths (rate, loss) points and picks a peak rate: a third of where the smoothed loss was lowest.

    At the lowest point the loss is about to rise; a third of it lies on the slope before (Smith takes the slope's
    upper end, fastai a tenth of the lowest point for rates that stay, without warm-up).

    Raises:
        DataError: the smoothed loss was never below its start.
    """
    smooth, held = list[tuple[float, float]](), 0.0
    for n, (rate, loss) in enumerate(points, start=1):
        held = _KEEP * held + (1 - _KEEP) * loss
        smooth.append((rate, held / (1 - _KEEP**n)))
    rate, loss = min(smooth, key=lambda point: point[1])
    if loss >= smooth[0][1]:
        raise DataError("the loss never fell: no rate of the range trains this model", place="range_test")
    return RangeResult(smooth, rate / 3, rate)


def _losses(test: RangeTest, world: World) -> list[tuple[float, float]]:
    options = test.job.train
    data, _ = open_sides(test.job, verify=True)
    strategy, _ = pretraining_model(test.job, data, world)
    model = strategy.model
    optimizer = make_optimizer(model, options)
    objective, best = checked(choose_objective(options, "causal_lm")), math.inf
    points: list[tuple[float, float]] = []
    model.train()
    with Feed(data, make_order(data, options), options.micro_batch, 0, 1, world.device) as feed:
        for step in range(test.steps):
            rate = test.lowest * (test.highest / test.lowest) ** (step / (test.steps - 1))
            set_learning_rate(optimizer, rate)
            sums = strategy.forward_backward(objective, feed.take(step, more=step + 1 < test.steps)[0])
            weight, loss = float(sums["weight"]), float(sums["loss"])
            strategy.scale_gradients(1 / max(weight, 1.0))
            if options.clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            mean = loss / max(weight, 1.0)
            if not math.isfinite(mean) or mean > 2 * _BROKEN * best:
                break
            points.append((rate, mean))
            best = min(best, mean)
    return points


def _page(test: RangeTest, result: RangeResult) -> Page:
    facts = [
        ("suggested learning_rate", f"{result.suggestion:.2g}"),
        ("lowest smoothed loss at", f"{result.lowest_at:.2g}"),
        ("rates", f"{test.lowest:g} to {result.points[-1][0]:.2g} in {len(result.points)} steps"),
        ("optimizer", test.job.train.optimizer),
    ]
    curve = [(math.log10(rate), loss) for rate, loss in result.points]
    mark = [(math.log10(result.suggestion), loss) for _, loss in (min(curve), max(curve, key=lambda p: p[1]))]
    lines = [Line("smoothed loss", curve), Line("suggestion", mark, "#c2410c", dashed=True)]
    return Page("Learning-rate range test", facts, [("Loss by log10 of the rate", lines)])
