"""Open-loop load: requests arrive at a given rate whether or not earlier ones are answered, as users do.

A closed loop (a fixed number of waiting clients) slows down together with the server and hides its queue; an open
one shows latency as it would be at that load. Arrivals are Poisson with a fixed seed.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from modelyard.errors import ModelyardError, RecipeError
from modelyard.serving.client import Client, Refused

WORDS = (
    "the",
    "engine",
    "answers",
    "many",
    "requests",
    "at",
    "once",
    "and",
    "each",
    "has",
    "a",
    "budget",
    "of",
    "tokens",
)


@dataclass(frozen=True)
class Load:
    """What to offer: `rate` requests a second for `seconds`, prompts of about `prompt` words, answers of `tokens`."""

    rate: float
    seconds: float
    prompt: int = 64
    tokens: int = 64
    seed: int = 0

    def check(self) -> None:
        """Raises RecipeError for a load that is none."""
        for name in ("rate", "seconds", "prompt", "tokens"):
            if not getattr(self, name) > 0:
                raise RecipeError(f"{name} is {getattr(self, name)}", place=name, mend=f"give {name} above zero")
        if self.rate * self.seconds > 1_000_000:
            raise RecipeError("more than a million requests", place="rate, seconds", mend="lower one of them")


@dataclass
class Seen:
    """One request: seconds to the first text and to the end, tokens, and the error if it failed."""

    first: float = math.nan
    total: float = math.nan
    tokens: int = 0
    error: str = ""


@dataclass
class Result:
    """All requests of one load."""

    load: Load
    wall: float
    seen: list[Seen] = field(default_factory=list)

    @property
    def answered(self) -> list[Seen]:
        """Those that were answered to the end."""
        return [s for s in self.seen if not s.error]

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens over the whole time."""
        return sum(s.tokens for s in self.answered) / self.wall

    def errors(self) -> dict[str, int]:
        """Failures by kind."""
        kinds = [s.error for s in self.seen if s.error]
        return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}

    def first(self, share: float) -> float:
        """A quantile of the time to the first text, seconds."""
        return quantile([s.first for s in self.answered], share)

    def each(self, share: float) -> float:
        """A quantile of the time between tokens, seconds."""
        return quantile([(s.total - s.first) / (s.tokens - 1) for s in self.answered if s.tokens > 1], share)

    def total(self, share: float) -> float:
        """A quantile of the time to the end, seconds."""
        return quantile([s.total for s in self.answered], share)


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` of them do not exceed; nan of none."""
    ordered = sorted(v for v in values if not math.isnan(v))
    return ordered[min(math.ceil(share * len(ordered)), len(ordered)) - 1] if ordered else math.nan


async def offer(client: Client, model: str, load: Load, tick: Callable[[Seen], None] | None = None) -> Result:
    """Offers a load and waits for the last answer. Raises RecipeError for a load that is none."""
    load.check()
    chance = random.Random(load.seed)
    result, began = Result(load, 0.0), time.perf_counter()
    running: set[asyncio.Task[None]] = set()
    due = 0.0
    while (due := due + chance.expovariate(load.rate)) < load.seconds:
        await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
        prompt = " ".join(chance.choice(WORDS) for _ in range(load.prompt))
        seen = Seen()
        result.seen.append(seen)
        task = asyncio.create_task(_ask(client, model, prompt, load.tokens, seen, tick))
        running.add(task)
        task.add_done_callback(running.discard)
    await asyncio.gather(*running)
    result.wall = time.perf_counter() - began
    return result


async def _ask(
    client: Client, model: str, prompt: str, tokens: int, seen: Seen, tick: Callable[[Seen], None] | None
) -> None:
    try:
        async for piece in client.complete(model, prompt, max_tokens=tokens, temperature=0):
            if piece.text and math.isnan(seen.first):
                seen.first = piece.seconds
            seen.total, seen.tokens = piece.seconds, piece.tokens or seen.tokens
    except Refused as error:
        seen.error = str(error.status)
    except ModelyardError as error:
        seen.error = error.what.split(":")[0]
    if tick is not None:
        tick(seen)


def plot(results: Sequence[Result], title: str) -> str:
    """A page with latency against offered load (p50 and p99) as inline SVG, and the table."""
    curves: list[tuple[str, Callable[[Result], float]]] = [
        ("first token p50", lambda r: r.first(0.5)), ("first token p99", lambda r: r.first(0.99)),
        ("answer p50", lambda r: r.total(0.5)), ("answer p99", lambda r: r.total(0.99)),
    ]  # fmt: skip
    drawn = [(name, [(r.load.rate, of(r)) for r in results if not math.isnan(of(r))]) for name, of in curves]
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row(r)) + "</tr>" for r in results)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1><p>Open loop, Poisson arrivals. </p>"
        f"{_svg(drawn)}<div><table><tr>{''.join(f'<th>{cell}</th>' for cell in HEAD)}</tr>{rows}</table></div></html>\n"
    )


HEAD = ("req/s", "done", "failed", "tok/s", "first p50", "first p99", "token p50", "answer p50", "answer p99")
"""Columns of :func:`row`."""


def row(r: Result) -> tuple[str, ...]:
    """One load's figures as text."""
    failed = ", ".join(f"{number} x {kind}" for kind, number in r.errors().items()) or "0"
    return (f"{r.load.rate:g}", str(len(r.answered)), failed, f"{r.tokens_per_second:,.0f}", _ms(r.first(0.5)),
            _ms(r.first(0.99)), _ms(r.each(0.5)), _ms(r.total(0.5)), _ms(r.total(0.99)))  # fmt: skip


def _ms(seconds: float) -> str:
    return "-" if math.isnan(seconds) else f"{seconds * 1000:,.0f} ms"


_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:800px;padding:0 1em}svg{width:100%}"
    "h1{font-size:1.3em;overflow-wrap:anywhere}div{overflow-x:auto}"
    "table{border-collapse:collapse}td,th{padding:.2em 1em .2em 0;text-align:right;white-space:nowrap}"
    "text{font:12px system-ui,sans-serif;fill:#555}"
)
_STEPS = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10)
_COLORS = ("#2463b8", "#8ab4e8", "#c4572e", "#eba98c")


def _round(value: float) -> float:
    """A number not far above `value` whose quarters are short."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(power * step for step in _STEPS if power * step >= value * (1 - 1e-9))


def _svg(drawn: Sequence[tuple[str, Sequence[tuple[float, float]]]]) -> str:
    points = [point for _, line in drawn for point in line]
    if not points:
        return "<p>nothing was answered</p>"
    right, top = _round(max(x for x, _ in points)), _round(max(y for _, y in points))
    parts = [
        '<text x="310" y="298" text-anchor="middle">requests offered a second</text>',
        '<text x="14" y="140" text-anchor="middle" transform="rotate(-90 14 140)">seconds</text>',
    ]
    for i in range(5):
        y, x = 260 - 240 * i / 4, 60 + 500 * i / 4
        parts.append(f'<line x1="60" x2="560" y1="{y:.0f}" y2="{y:.0f}" stroke="#8884"/>')
        parts.append(f'<text x="54" y="{y + 4:.0f}" text-anchor="end">{top * i / 4:.4g}</text>')
        parts.append(f'<text x="{x:.0f}" y="278" text-anchor="middle">{right * i / 4:.4g}</text>')
    for i, (name, line) in enumerate(drawn):
        at = [(60 + 500 * x / right, 260 - 240 * y / top) for x, y in line]
        route = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{route}" fill="none" stroke="{_COLORS[i]}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{_COLORS[i]}"/>' for x, y in at]
        parts.append(f'<rect x="574" y="{22 + 20 * i}" width="11" height="11" fill="{_COLORS[i]}"/>')
        parts.append(f'<text x="590" y="{32 + 20 * i}">{name}</text>')
    return f'<svg viewBox="0 0 720 304" role="img" aria-label="latency against load">{"".join(parts)}</svg>'
