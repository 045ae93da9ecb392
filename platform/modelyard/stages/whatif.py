"""What if: layouts on other hardware, the model a budget buys, and the plan as a page. Starts nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from modelyard.errors import DataError, RecipeError, ResourceError
from modelyard.planner import html
from modelyard.planner.choose import Choice, choose
from modelyard.planner.hardware import find_hardware
from modelyard.planner.measured import Difference, compare
from modelyard.planner.options import options as other_hardware
from modelyard.recipe import Recipe
from modelyard.stages.calibration import calibrated, scaling_runs
from modelyard.stages.graph import plan_context, plan_graph

if TYPE_CHECKING:
    from modelyard.planner.estimate import Estimate
    from modelyard.planner.fitting import Fit
    from modelyard.planner.search import Search
    from modelyard.stages.api import StagePlan
    from modelyard.storage import Artifact

_MONEY = re.compile(r"^\s*\$?\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z$]*)\s*$")
LEAST_RUNS = 6
"""Pre-training runs a scaling law of one's own needs: it has five coefficients."""


@dataclass(frozen=True)
class Shape:
    """What a pre-training stage would train, before its resources are chosen."""

    stage: str
    config: Mapping[str, Any]
    sequence_length: int
    global_batch: int
    tokens: float | None
    workers: int
    hardware: str | None
    cores: float


def dollars(text: str) -> float:
    """`500USD`, `$500` or `500` as a number of US dollars.

    Raises:
        RecipeError: another currency, or not an amount above zero.
    """
    match = _MONEY.match(text)
    if match is None or match.group(2).upper() not in ("", "USD", "$"):
        raise RecipeError(f"{text!r} is not an amount of US dollars", place="--budget", mend="write 500USD or 500")
    if float(match.group(1)) <= 0:
        raise RecipeError(f"the budget is {text}", place="--budget", mend="give more than 0 USD")
    return float(match.group(1))


def shapes(recipe: Recipe) -> list[Shape]:
    """The pre-training stages of a recipe whose model and sequence length are known. Raises RecipeError."""
    from modelyard.stages.pretrain import PretrainOptions, known_shape

    planned = plan_graph(recipe)
    artifacts = {entry.node.name: entry.artifact for entry in planned if entry.artifact}
    found = []
    for entry in planned:
        options = entry.node.options
        if not isinstance(options, PretrainOptions):
            continue
        config, length, tokens = known_shape(plan_context(recipe, entry, artifacts))
        if config is not None and length is not None:
            r = options.resources
            found.append(Shape(entry.node.name, config, length, options.global_batch, tokens, r.workers, r.hardware,
                               r.cpus_per_worker))  # fmt: skip
    return found


def layouts(shape: Shape, hardware: str | None, devices: int | None) -> Search:
    """The layouts of one stage's model on devices, best first.

    Raises:
        RecipeError: unknown hardware, or a batch that cannot be spread.
        ResourceError: nothing fits; says what comes closest.
    """
    from modelyard.planner.search import search

    hw = find_hardware(hardware or shape.hardware)
    return search(
        shape.config, sequence_length=shape.sequence_length, global_batch=shape.global_batch,
        devices=devices or shape.workers, hardware=hw, precision_name="fp32" if hw.kind == "cpu" else "mixed",
    )  # fmt: skip


def own_layouts(shapes: Sequence[Shape]) -> dict[str, Search]:
    """Stage -> layouts on the hardware its recipe names; stages of one worker, or that fit nowhere, are left out."""
    found = {}
    for shape in shapes:
        with suppress(ResourceError):
            if shape.workers > 1:
                found[shape.stage] = layouts(shape, None, None)
    return found


def own_law(root: str | None) -> Fit | None:
    """The scaling law fitted to a root's own pre-training runs; None where there are too few or too equal ones."""
    from modelyard.planner.fitting import fit

    runs = scaling_runs(root) if root else []
    if len(runs) < LEAST_RUNS:
        return None
    try:
        return fit(runs)
    except DataError:
        return None


def within(
    *, budget: str | None, hours: float | None, shape: Shape | None, hardware: str | None, devices: int | None,
    root: str | None, spot: bool, fixed: bool, own: bool,
) -> Choice:  # fmt: skip
    """The model and tokens a budget of money, hours or both buys.

    Args:
        budget: dollars as text, such as `500USD`.
        hours: wall hours.
        shape: a stage that gives sequence length, vocabulary and, where not stated, devices.
        hardware: name in the table; None = the stage's, else this machine.
        devices: how many; None = the stage's workers.
        root: where calibrations and own runs are looked up.
        spot: on spot capacity.
        fixed: keep the stage's model and choose only the tokens.
        own: by the law fitted to the root's own runs.

    Raises:
        RecipeError: no or a non-positive budget, unknown hardware, a device without a price, or too small a budget.
        DataError: `own` without enough runs.
    """
    cores = shape.cores if shape else 1.0
    law = own_law(root) if own else None
    if own and law is None:
        raise DataError(
            f"fewer than {LEAST_RUNS} pre-training runs of different sizes and tokens with a held-out loss",
            place=str(root), mend="leave --own-law out, or train more sizes first",
        )  # fmt: skip
    return choose(
        budget_usd=None if budget is None else dollars(budget), hours=hours,
        hardware=calibrated(root, hardware or (shape.hardware if shape else None), cores),
        devices=devices or (shape.workers if shape else 1), cores_per_worker=cores,
        sequence_length=shape.sequence_length if shape else 2048,
        vocab_size=int(shape.config["vocab_size"]) if shape else 32_000, law=None if law is None else law.law,
        spot=spot, config=shape.config if fixed and shape else None,
    )  # fmt: skip


def differences(artifact: Artifact, estimate: Estimate) -> list[Difference]:
    """Predicted against measured of a published stage."""
    m = artifact.manifest
    return compare(
        estimate, seconds=m.metrics.get("train_seconds", m.seconds), energy_kwh=m.metrics.get("energy_kwh"),
        tokens_per_second=m.metrics.get("tokens_per_second"), memory_bytes=m.metrics.get("peak_memory_bytes"),
    )  # fmt: skip


def page(
    title: str, plans: Sequence[StagePlan], artifacts: Mapping[str, Artifact], found: Mapping[str, Search],
    choice: Choice | None = None, region: str = "world", law: Any = None,
) -> str:  # fmt: skip
    """The plan as one page: every stage's figures; memory, layouts, cost and loss of those that train.

    Raises RecipeError for an unknown region.
    """
    sections = []
    if choice is not None:
        sections.append(html.estimate_section("what the budget buys", choice.estimate))
        sections += _training(choice.estimate.basis or {}, choice.estimate.flops, region, law)
        sections.append(html.memory_section(choice.estimate.memory_parts))
    for plan in plans:
        e = plan.estimate
        sections.append(html.estimate_section(f"{plan.name} ({plan.kind})", e))
        if plan.name in artifacts:
            sections.append(html.measured_section(differences(artifacts[plan.name], e)))
        if e.memory_parts:
            hw = find_hardware(e.basis["hardware"]) if e.basis else None
            limit = hw.memory if hw is not None and hw.kind != "cpu" else None
            sections.append(html.memory_section(e.memory_parts, limit))
        if plan.name in found:
            sections.append(html.layouts_section(found[plan.name]))
        if e.basis is not None:
            sections += _training(e.basis, e.flops, region, law)
    return html.page(title, sections)


def _training(basis: Mapping[str, Any], flops: float | None, region: str, law: Any) -> list[str]:
    """Parameters by part, the same run on other hardware, and loss against compute."""
    if not basis:
        return []
    offers = other_hardware(basis["config"], basis["tokens"], basis["sequence_length"], region=region)
    return [
        html.parameters_section(basis["config"]), html.cost_section(offers), html.returns_section(law, flops),
    ]  # fmt: skip


DAY = (
    0.2, 0.15, 0.1, 0.1, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 0.95, 1.0, 0.95, 0.95, 1.0, 1.0, 0.95, 0.9, 0.8, 0.7, 0.6,
    0.5, 0.4, 0.3,
)  # fmt: skip
"""Load of each hour of a working day over that of its busiest hour: what `modelyard capacity` assumes."""


def config_of(model: str) -> Mapping[str, Any]:
    """The config a person names: a preset, a `config.json`, or a model folder (local or s3://).

    Raises:
        RecipeError: none of these; names the nearest preset.
        DataError: the file is not a JSON object.
    """
    import difflib
    import json

    from modelyard.models.presets import PRESETS
    from modelyard.storage import exists, join, read_bytes

    if model in PRESETS:
        return PRESETS[model].config()
    place = model if model.endswith(".json") else join(model, "config.json")
    if not exists(place):
        near = difflib.get_close_matches(model, PRESETS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"no model {model!r}", place="model", mend=hint + "presets: " + ", ".join(PRESETS))
    try:
        found = json.loads(read_bytes(place))
    except ValueError as error:
        raise DataError(f"not JSON: {error}", place=place, mend="give the config.json of a model") from error
    if not isinstance(found, dict):
        raise DataError("not a JSON object", place=place, mend="give the config.json of a model")
    return found
