"""Commands that look or tidy: status, report, schema, gc, ui."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from modelyard.cli.work import Assignments, RecipePath, Root, load


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    for command in (status, report, schema, gc, ui):
        app.command()(command)


def status(recipe: RecipePath, assignments: Assignments = None, root: Root = None) -> None:
    """Shows what of a recipe is done, where it lies, and its latest MLflow runs."""
    from modelyard.cli import tables
    from modelyard.stages import api
    from modelyard.storage import ArtifactStore
    from modelyard.tracking import status as recent_runs

    loaded = load(recipe, assignments, root)
    console = Console()
    console.print(tables.status_table(ArtifactStore(loaded.root), api.plan(loaded)))
    console.print(tables.runs_table(recent_runs(loaded.root, loaded.name)))


def report(
    recipe: RecipePath,
    assignments: Assignments = None,
    root: Root = None,
    browser: Annotated[bool, typer.Option("--open", help="open it in a browser")] = False,
) -> None:
    """Writes one HTML page over the whole recipe: figures of every stage and links to their reports."""
    from modelyard.stages.report import write_report

    page = write_report(load(recipe, assignments, root))
    Console().print(f"report: {page}")
    if browser:
        typer.launch(str(page))


def schema(
    kind: Annotated[str | None, typer.Argument(help="only this stage kind")] = None,
) -> None:
    """Prints the JSON Schema of recipes, for completion in an editor and for reading every option."""
    from modelyard.stages.schema import recipe_schema

    print(json.dumps(recipe_schema(kind), indent=1))


def gc(
    root: Annotated[str, typer.Argument(help="the root to tidy")] = ".modelyard",
    keep: Annotated[int, typer.Option(min=1, help="published artifacts to keep for each stage, newest first")] = 2,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it only says what would go")] = False,
) -> None:
    """Finds what no manifest vouches for, and old artifacts beyond the newest of each stage.

    The work folder of an interrupted run holds its checkpoints: finish the run first, or lose them.
    """
    from modelyard.stages.garbage import collect, delete

    console = Console()
    found = collect(root, keep)
    for item in found:
        console.print(f"{item.bytes / 1e6:10.1f} MB  {item.reason:<34} {item.uri}", highlight=False)
    total = sum(item.bytes for item in found) / 1e6
    if yes:
        delete(found)
        console.print(f"removed {len(found)} folders, {total:.1f} MB")
    else:
        console.print(f"{len(found)} folders, {total:.1f} MB; `modelyard gc {root} --yes` removes them")


def ui(
    root: Annotated[str, typer.Argument(help="root whose runs to show")] = ".modelyard",
    port: Annotated[int, typer.Option()] = 5000,
) -> None:
    """Opens the MLflow UI on this machine for the runs, metrics and models of a root."""
    from modelyard.tracking import ui as mlflow_ui

    Console(stderr=True).print(f"MLflow at http://127.0.0.1:{port} for {Path(root)} (Ctrl-C ends it)")
    mlflow_ui(root, port)
