"""Commands that talk to a running server: a chat in the terminal, and load with latencies."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from modelyard.errors import ModelyardError, RecipeError

if TYPE_CHECKING:
    from modelyard.serving.client import Client
    from modelyard.serving.load import Result

    Connect = Callable[[], Client]

Url = Annotated[str, typer.Argument(help="address of the server, such as http://127.0.0.1:8000")]
Key = Annotated[str | None, typer.Option(help="API key", envvar="MODELYARD_API_KEY", show_envvar=True)]

Ca = Annotated[
    str | None, typer.Option(help="PEM file of the certificates to trust over HTTPS; default the well-known ones")
]


def add(app: typer.Typer) -> None:
    """Adds the commands of this module."""
    app.command()(chat)
    app.command(name="bench-serve")(bench_serve)


def chat(
    url: Url = "http://127.0.0.1:8000",
    key: Key = None,
    ca: Ca = None,
    model: Annotated[str | None, typer.Option(help="model name; default the server's first")] = None,
    system: Annotated[str | None, typer.Option(help="system prompt")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at most")] = 512,
) -> None:
    """Talks to a served model. An empty line or Ctrl-D ends, `/new` starts anew, Ctrl-C stops an answer."""
    console, connect = Console(), _client(url, key, ca)
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
    with asyncio.Runner() as runner:
        name = model or runner.run(_name(connect))
        console.print(f"[bold]{name}[/] at {url}  [dim](empty line ends, /new starts anew)[/]")
        start = [{"role": "system", "content": system}] if system else []
        turns = list(start)
        while (text := _line(console)) is not None:
            if text == "/new":
                turns = list(start)
                continue
            turns.append({"role": "user", "content": text})
            try:
                turns.append({"role": "assistant", "content": runner.run(_say(console, connect, name, turns, options))})
            except KeyboardInterrupt:
                console.print("\n[dim]stopped[/]")
                turns.pop()
            except ModelyardError as error:
                console.print(error.what, style="red", markup=False, highlight=False)
                if error.mend:
                    console.print(error.mend, style="dim", markup=False)
                turns.pop()


def _line(console: Console) -> str | None:
    try:
        return console.input("[bold cyan]> [/]").strip() or None
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _client(url: str, key: str | None, ca: str | None) -> Connect:
    from modelyard.serving.client import Client

    return partial(Client, url, key, ca=ca)


async def _name(connect: Connect) -> str:
    async with connect() as client:
        return await client.model()


async def _say(
    console: Console, connect: Connect, name: str, turns: list[dict[str, str]], options: dict[str, Any]
) -> str:
    """Prints an answer as it comes and returns it."""
    text, seconds, tokens = "", 0.0, 0
    async with connect() as client:
        async for piece in client.chat(name, turns, **options):
            console.print(piece.text, end="", markup=False, highlight=False, soft_wrap=True)
            text, seconds, tokens = text + piece.text, piece.seconds, piece.tokens or tokens
    console.print(f"\n[dim]{tokens} tokens, {tokens / max(seconds, 1e-9):.1f} tokens/s[/]")
    return text


def bench_serve(
    url: Url = "http://127.0.0.1:8000",
    key: Key = None,
    ca: Ca = None,
    rates: Annotated[str, typer.Option(help="requests a second to offer, one after the other")] = "1,2,4,8",
    seconds: Annotated[float, typer.Option(help="how long each rate is offered")] = 20.0,
    prompt: Annotated[int, typer.Option(help="words of a prompt")] = 64,
    tokens: Annotated[int, typer.Option(help="tokens of an answer at most")] = 64,
    model: Annotated[str | None, typer.Option(help="model name; default the server's first")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="write a page with the latency plot")] = None,
) -> None:
    """Measures a server under open-loop load: requests arrive at a rate whether or not earlier ones are answered."""
    from rich.table import Table

    from modelyard.serving import load

    loads = [load.Load(rate, seconds, prompt, tokens, seed) for seed, rate in enumerate(_rates(rates))]
    for one in loads:
        one.check()
    _make_room(html)
    results = asyncio.run(_measure(_client(url, key, ca), model, loads))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in load.HEAD:
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in results:
        table.add_row(*load.row(result))
    console = Console()
    console.print(table)
    if html is not None:
        html.write_text(load.plot(results, f"Latency of {url}"), encoding="utf-8")
        console.print(f"page: {html}", soft_wrap=True)


def _make_room(page: Path | None) -> None:
    """Raises RecipeError, before anything is measured, when the page could not be written."""
    if page is None:
        return
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.open("a").close()
    except OSError as error:
        raise RecipeError(f"the page cannot be written: {error.strerror}", place=str(page)) from error


def _rates(text: str) -> list[float]:
    """Raises RecipeError for anything but numbers above zero."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or any(not 0 < rate < math.inf for rate in found):
        raise RecipeError(f"{text!r} is not a list of rates", place="--rates", mend="write 1,2,4")
    return found


async def _measure(connect: Connect, model: str | None, loads: list[Any]) -> list[Result]:
    from modelyard.serving.load import offer

    console = Console(stderr=True)
    async with connect() as client:
        name = model or await client.model()
        results = []
        for load in loads:
            console.print(f"{load.rate:g} requests/s for {load.seconds:g} s ...")
            results.append(await offer(client, name, load))
    return results
