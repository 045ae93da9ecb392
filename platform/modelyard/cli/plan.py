"""`plan` and what it learns from: what a run would do and need, what a budget buys, calibration, scaling laws."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from modelyard.cli.work import Assignments, Force, Root, TargetKinds, Targets, load
from modelyard.errors import RecipeError

if TYPE_CHECKING:
    from modelyard.planner.choose import Choice
    from modelyard.planner.search import Search
    from modelyard.recipe import Recipe
    from modelyard.stages.whatif import Shape

RootArgument = Annotated[str, typer.Argument(help="root whose runs in MLflow to learn from")]


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    for command in (plan, calibrate, scaling, capacity):
        app.command()(command)


def plan(
    recipe: Annotated[Path | None, typer.Argument(help="recipe file; may be left out with --budget or --hours")] = None,
    assignments: Assignments = None,
    root: Root = None,
    to: Targets = None,
    to_kind: TargetKinds = None,
    force: Force = None,
    html: Annotated[Path | None, typer.Option("--html", help="write the plan as a page with plots")] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="USD", help="money to spend, such as 500USD: chooses model size and tokens")
    ] = None,
    hours: Annotated[float | None, typer.Option(help="wall hours to spend: chooses model size and tokens")] = None,
    hardware: Annotated[
        str | None, typer.Option(help="device of the hardware table, such as h100: shows layouts on it")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="number of devices: shows layouts on them")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="spend the budget on spot capacity")] = False,
    keep_model: Annotated[bool, typer.Option("--keep-model", help="choose only the tokens for a budget")] = False,
    own_law: Annotated[
        bool, typer.Option("--own-law", help="use the scaling law fitted to the root's own runs")
    ] = False,
    region: Annotated[str, typer.Option(help="electricity grid for emissions, such as france")] = "world",
) -> None:
    """Shows what a run would do, and why: what is done, what runs again, predicted size, time, memory, cost.

    With --budget or --hours it chooses the model and the tokens for them; with --hardware and --devices it
    lists the ways to cut the recipe's model over them. Touches no data and starts nothing.
    """
    from modelyard.cli import tables
    from modelyard.planner.cost import carbon_intensity
    from modelyard.stages import api, whatif

    carbon_intensity(region)
    if recipe is None and budget is None and hours is None:
        raise RecipeError("no recipe", place="plan", mend="name a recipe file, or give --budget 500USD or --hours 24")
    console = Console()
    loaded = None if recipe is None else load(recipe, assignments, root, to, to_kind)
    shapes = [] if loaded is None else whatif.shapes(loaded)
    choice = None
    if budget is not None or hours is not None:
        where = root or (loaded.root if loaded else ".modelyard")
        choice = whatif.within(
            budget=budget, hours=hours, shape=shapes[0] if shapes else None, hardware=hardware, devices=devices,
            root=where, spot=spot, fixed=keep_model, own=own_law,
        )  # fmt: skip
        console.print(tables.choice_table(choice))
        # One line however narrow the terminal, so that it can be copied.
        lines = tables.choice_lines(choice, shapes[0].stage if shapes else None)
        console.print(lines, soft_wrap=True, markup=False, highlight=False)
    found = _layouts(console, shapes, hardware, devices) if choice is None and (hardware or devices) else {}
    plans = api.plan(loaded, force=force or ()) if loaded is not None and not found and choice is None else []
    if loaded is not None and plans:
        console.print(tables.plan_table(loaded, plans))
    if html is not None:
        _write_page(console, html, loaded, found or whatif.own_layouts(shapes), choice, region, own_law)


def _layouts(console: Console, shapes: list[Shape], hardware: str | None, devices: int | None) -> dict[str, Search]:
    from modelyard.cli import tables
    from modelyard.stages import whatif

    if not shapes:
        raise RecipeError(
            "no pre-training stage whose model is known yet", place="plan", mend="run the stages before it first"
        )
    found = {}
    for shape in shapes:
        found[shape.stage] = whatif.layouts(shape, hardware, devices)
        console.print(tables.layouts_table(shape.stage, found[shape.stage]))
    return found


def _write_page(
    console: Console, target: Path, loaded: Recipe | None, found: dict[str, Search], choice: Choice | None,
    region: str, own_law: bool,
) -> None:  # fmt: skip
    from modelyard.stages import api, whatif
    from modelyard.storage import ArtifactStore

    plans = api.plan(loaded) if loaded is not None and choice is None else []
    artifacts = {}
    if loaded is not None:
        store = ArtifactStore(loaded.root)
        known = {p.name: store.find(p.name, p.fingerprint) for p in plans}
        artifacts = {name: artifact for name, artifact in known.items() if artifact is not None}
    law = whatif.own_law(loaded.root) if own_law and loaded is not None else None
    title = f"Plan: {loaded.name}" if loaded is not None else "Plan of a budget"
    text = whatif.page(title, plans, artifacts, found, choice, region, None if law is None else law.law)
    target.write_text(text, encoding="utf-8")
    console.print(f"page: {target}")


def calibrate(root: RootArgument = ".modelyard") -> None:
    """Fits the planner's efficiency and bandwidth to this root's finished training runs.

    Later plans of recipes with this root use them; `calibration.json` in the root holds them.
    """
    from modelyard.cli import tables
    from modelyard.stages.calibration import calibrate as fit

    console = Console()
    for fitted in fit(root):
        console.print(tables.calibration_table(fitted))


def scaling(
    root: RootArgument = ".modelyard",
    flops: Annotated[float, typer.Option(min=1.0, help="compute to predict for, 6 x parameters x tokens")] = 1e19,
) -> None:
    """Fits a scaling law to the root's pre-training runs, and says for each whether going on would pay.

    Six runs of different sizes and tokens are needed for a law; with fewer, Hoffmann et al.'s is shown.
    """
    from modelyard.cli import tables
    from modelyard.stages.calibration import advice, scaling_runs
    from modelyard.stages.whatif import own_law

    console = Console()
    console.print(tables.scaling_table(own_law(root), len(scaling_runs(root)), flops))
    for name, found in advice(root):
        console.print(f"{name}: {found.text}", highlight=False)


def capacity(
    model: Annotated[str, typer.Argument(help="config.json, a model folder, or a preset such as llama-8b")],
    hardware: Annotated[str, typer.Option(help="device of the hardware table")] = "h100",
    load: Annotated[float, typer.Option(help="requests a second at the busiest")] = 10.0,
    prompt: Annotated[int, typer.Option(min=1, help="mean tokens of a prompt")] = 512,
    answer: Annotated[int, typer.Option(min=1, help="mean tokens of an answer")] = 256,
    dtype: Annotated[str, typer.Option(help="of the weights: fp32, bf16, fp8, int8, int4")] = "bf16",
    tensor: Annotated[int, typer.Option(min=1, help="devices a replica")] = 1,
    time_per_token: Annotated[float, typer.Option(help="seconds between tokens at most")] = 0.05,
) -> None:
    """Replicas, speed and cost of serving a load, and which of the four ways to infer is cheapest at which load."""
    from modelyard.cli import tables
    from modelyard.planner.inference import deploy
    from modelyard.planner.modes import compare_modes
    from modelyard.stages.whatif import DAY, config_of

    config = config_of(model)
    options = {"hardware": hardware, "prompt": prompt, "answer": answer, "dtype": dtype, "tensor": tensor}
    found = deploy(config, requests_per_second=load, time_per_token=time_per_token, **options)  # type: ignore[arg-type]
    profile = [load * 3600 * share for share in DAY]
    modes = compare_modes(config, hourly_requests=profile, time_per_token=time_per_token, **options)  # type: ignore[arg-type]
    Console().print(tables.capacity_table(f"{model} on {hardware}", found, modes))
