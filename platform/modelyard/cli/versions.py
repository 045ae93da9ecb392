"""Commands over registered versions: which there are, which one an alias means, and back to the one before."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

Name = Annotated[str, typer.Argument(help="registered model, such as quickstart")]
Alias = Annotated[str, typer.Option(help="alias to move")]
RootOption = Annotated[str, typer.Option("--root", help="root whose MLflow store knows the model")]
Reason = Annotated[str, typer.Option(help="why, for the history")]


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    for command in (promote, rollback, versions):
        app.command()(command)


def promote(
    name: Name,
    version: Annotated[int, typer.Argument(min=1, help="version to point at")],
    alias: Alias = "champion",
    reason: Reason = "promoted",
    root: RootOption = ".modelyard",
) -> None:
    """Points an alias at a version. Servers that follow the alias roll to it without a failed request."""
    from modelyard.tracking import Aliases, Registry

    made = Aliases(Registry(root)).move(name, alias, version, reason)
    console = Console()
    if made is None:
        console.print(f"{name}@{alias} is at version {version} already")
    else:
        console.print(f"{name}@{alias}: version {made.before or 'none'} -> [bold]{made.version}[/]")


def rollback(
    name: Name,
    alias: Alias = "champion",
    to: Annotated[int | None, typer.Option(min=1, help="version to go back to; default the one before")] = None,
    reason: Reason = "rollback",
    root: RootOption = ".modelyard",
) -> None:
    """Points an alias back at the version before. Servers that follow the alias roll back; again goes further back."""
    from modelyard.tracking import Aliases, Registry

    made = Aliases(Registry(root)).rollback(name, alias, to, reason)
    Console().print(f"{name}@{alias}: version {made.before} -> [bold]{made.version}[/]")


def versions(name: Name, alias: Alias = "champion", root: RootOption = ".modelyard") -> None:
    """Lists a model's versions, what the aliases mean, and the moves of one alias."""
    from rich.table import Table

    from modelyard.tracking import Aliases, Registry

    registry = Registry(root)
    aliases = Aliases(registry)
    current = aliases.current(name)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("version", "aliases", "stage", "folder"):
        table.add_column(column, overflow="fold")
    for found in registry.versions(name):
        names = ", ".join(sorted(a for a, version in current.items() if version == found.version))
        table.add_row(str(found.version), names, found.tags.get("stage", ""), found.uri)
    console = Console()
    console.print(table)
    for move in aliases.history(name, alias):
        console.print(
            f"{move.time}  {alias}: {move.before or 'none'} -> {move.version}  {move.reason}  ({move.by})",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
