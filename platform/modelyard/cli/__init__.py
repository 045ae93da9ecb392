"""The `modelyard` command. Each command is a thin reading of arguments over `modelyard.stages.api`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import typer
from rich.console import Console

from modelyard.cli import ask, look, models, plan, versions, work
from modelyard.errors import ModelyardError

app = typer.Typer(
    name="modelyard",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="From raw text to a served model: one typed recipe, on this machine or on a Ray cluster.\n\n"
    "Start with [bold]modelyard plan pipelines/quickstart.yaml[/], then [bold]modelyard run[/] the same file.",
)
plan.add(app)
work.add(app)
look.add(app)
versions.add(app)
ask.add(app)
models.add(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command and exits: 0 done, 1 work failed, 2 a mistake to mend, 130 interrupted."""
    console = Console(stderr=True)
    code = 0
    # `ray job stop` and service managers end a job with SIGTERM: clean up as for Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except ModelyardError as error:
        _print(console, error)
        code = error.exit_code
    except KeyboardInterrupt:
        console.print("\n[yellow]interrupted[/]: the same command goes on from the last artifact or checkpoint")
        code = 130
    except Exception as error:
        # Typer vendors or depends on click; both report usage mistakes with exit_code and show().
        if not hasattr(error, "exit_code"):
            raise
        if hasattr(error, "show"):
            error.show()
        code = int(error.exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    if code == 130:
        # Stage threads may still be inside native code; waiting for them would ignore the Ctrl-C.
        os._exit(code)
    sys.exit(code)


def _print(console: Console, error: ModelyardError) -> None:
    console.print(f"[bold red]error[/] {type(error).__name__}: ", end="")
    console.print(error.what, markup=False, highlight=False, soft_wrap=True)
    for label, text in (("at", error.place), ("mend", error.mend)):
        if text:
            console.print(f"  [bold]{label}:[/] ", end="")
            console.print(text, markup=False, highlight=False, soft_wrap=True)
