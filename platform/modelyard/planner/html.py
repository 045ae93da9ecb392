"""The plan as one HTML page: bars and curves as inline SVG, no scripts, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from modelyard.planner import formatting as fmt
from modelyard.planner.estimate import Estimate
from modelyard.planner.measured import Difference
from modelyard.planner.options import Option
from modelyard.planner.parameters import count
from modelyard.planner.scaling import Chinchilla, Law, returns
from modelyard.planner.search import Search

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _RIGHT = 720, 280, 70, 40, 136
_COLORS = ("#2463b8", "#c4572e", "#3d8c5a", "#8a5fb0", "#b8902a", "#4aa3a3", "#9a9a9a")
_CAUSES = ("compute", "optimizer", "bubble", "communication")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:840px;color:#1c2430;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2.2em}h3{font-size:1em}svg{width:100%;height:auto}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92em}
td,th{padding:.2em 1.1em .2em 0;text-align:left;vertical-align:top;font-variant-numeric:tabular-nums}
td:nth-child(n+2){white-space:nowrap}td:last-child{white-space:normal}
th{border-bottom:1px solid #8886;font-weight:600}
text{font:12px system-ui,sans-serif;fill:#48525f}
.note{color:#5a6472}@media(prefers-color-scheme:dark){body{background:#14181d;color:#dde3ea}
text,.note{fill:#a6b0bc;color:#a6b0bc}}
"""


@dataclass(frozen=True)
class Curve:
    """One line of a plot: name, points, and for each point an optional label."""

    name: str
    points: Sequence[tuple[float, float]]
    labels: Sequence[str] = ()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; every cell is escaped."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{top}</tr>{body}</table></div>'


def bar(parts: Sequence[tuple[str, float]], limit: float | None = None, label: str = "memory of a worker") -> str:
    """A stacked bar of bytes by component with its legend, and the device's memory as a line."""
    total = sum(value for _, value in parts)
    scale = (_WIDTH - 20) / (max(total, limit or 0) or 1)
    found, x = [], 10.0
    for i, (name, value) in enumerate(parts):
        color, width = _COLORS[i % len(_COLORS)], value * scale
        found.append(f'<rect x="{x:.1f}" y="12" width="{width:.1f}" height="40" fill="{color}"/>')
        column, row = i % 3, i // 3
        left, top = 10 + column * 235, 82 + row * 20
        found.append(f'<rect x="{left}" y="{top - 10}" width="11" height="11" fill="{color}"/>')
        found.append(f'<text x="{left + 17}" y="{top}">{escape(name)} {escape(fmt.size(value))}</text>')
        x += width
    if limit:
        at = 10 + limit * scale
        found.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="60" stroke="#c22" stroke-width="2"/>')
    height = 82 + 20 * math.ceil(len(parts) / 3)
    caption = f"{label}: {fmt.size(total)}" + (f" of {fmt.size(limit)}" if limit else "")
    return (
        f'<p class="note">{escape(caption)}</p>'
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(caption)}">{"".join(found)}</svg>'
    )


def plot(curves: Sequence[Curve], x_title: str, y_title: str, *, log_x: bool = False, log_y: bool = False) -> str:
    """Lines over common axes, linear or logarithmic; points that a logarithm cannot show are left out."""
    drawn = [
        (curve, [(x, y) for x, y in curve.points if (x > 0 or not log_x) and (y > 0 or not log_y)]) for curve in curves
    ]
    points = [point for _, kept in drawn for point in kept]
    if not points:
        return '<p class="note">nothing to draw</p>'
    xs, ys = _Axis([x for x, _ in points], log_x), _Axis([y for _, y in points], log_y)
    parts = _grid(xs, ys, x_title, y_title)
    for i, (curve, kept) in enumerate(drawn):
        parts += _line(curve, kept, xs, ys, _COLORS[i % len(_COLORS)], i)
    title = escape(f"{y_title} against {x_title}")
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}">{"".join(parts)}</svg>'


class _Axis:
    """Maps one coordinate to 0..1."""

    def __init__(self, values: Sequence[float], log: bool) -> None:
        self.log = log
        low, high = self._map(min(values)), self._map(max(values))
        pad = (high - low) * 0.06 or abs(high) * 0.05 or 0.5
        self.low, self.high = low - pad, high + pad

    def _map(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def at(self, value: float) -> float:
        return (self._map(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        marks = [self.low + (self.high - self.low) * i / 4 for i in range(5)]
        return [10**mark for mark in marks] if self.log else marks


def _x(fraction: float) -> float:
    return _LEFT + fraction * (_WIDTH - _LEFT - _RIGHT)


def _y(fraction: float) -> float:
    return _HEIGHT - _BOTTOM - fraction * (_HEIGHT - _BOTTOM - 12)


def _grid(xs: _Axis, ys: _Axis, x_title: str, y_title: str) -> list[str]:
    found = []
    for value in ys.ticks():
        y = _y(ys.at(value))
        found.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        found.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(fmt.number(value))}</text>')
    for value in xs.ticks():
        x, mark = _x(xs.at(value)), escape(fmt.number(value))
        found.append(f'<text x="{x:.1f}" y="{_HEIGHT - 22}" text-anchor="middle">{mark}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    found.append(f'<text x="{middle}" y="{_HEIGHT - 5}" text-anchor="middle">{escape(x_title)}</text>')
    found.append(f'<text x="{_LEFT}" y="10">{escape(y_title)}</text>')
    return found


def _line(
    curve: Curve, points: Sequence[tuple[float, float]], xs: _Axis, ys: _Axis, color: str, place: int
) -> list[str]:
    at = [(_x(xs.at(x)), _y(ys.at(y))) for x, y in points]
    route = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
    found = [f'<polyline points="{route}" fill="none" stroke="{color}" stroke-width="2"/>'] if len(at) > 1 else []
    if len(at) <= 12:
        for i, (x, y) in enumerate(at):
            label = f"<title>{escape(curve.labels[i])}</title>" if i < len(curve.labels) else ""
            found.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}">{label}</circle>')
    top = 24 + 17 * place
    found.append(f'<rect x="{_WIDTH - _RIGHT + 14}" y="{top - 10}" width="11" height="11" fill="{color}"/>')
    found.append(f'<text x="{_WIDTH - _RIGHT + 30}" y="{top}">{escape(curve.name)}</text>')
    return found


def estimate_section(name: str, estimate: Estimate) -> str:
    """One stage's estimate as a table."""
    pairs = [
        ("parameters", fmt.number(estimate.parameters)), ("tokens", fmt.number(estimate.tokens)),
        ("work", fmt.flop(estimate.flops)), ("memory a worker", fmt.size(estimate.memory_bytes)),
        ("time", fmt.duration(estimate.seconds)), ("cost", fmt.money(estimate.cost_usd)),
        ("energy", fmt.energy(estimate.energy_kwh)),
    ]  # fmt: skip
    rows = [pair for pair in pairs if pair[1] != "-"]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in estimate.notes)
    return f"<h2>{escape(name)}</h2>{table(('', 'predicted'), rows) if rows else ''}{notes}"


def parameters_section(config: Mapping[str, Any]) -> str:
    """Parameters by part."""
    p = count(config)
    rows = [(name, fmt.number(value), fmt.share(value / p.total)) for name, value in p.rows()]
    head = f"<h3>Parameters: {fmt.number(p.total)}"
    return head + (f", {fmt.number(p.active)} a token" if p.active != p.total else "") + "</h3>" + table(
        ("part", "parameters", "share"), rows
    )  # fmt: skip


def memory_section(parts: Sequence[tuple[str, float]], limit: float | None = None) -> str:
    """Memory of one worker by component (`TrainingMemory.rows()`), against the device's."""
    return "<h3>Memory</h3>" + bar(parts, limit)


def layouts_section(found: Search, most: int = 10) -> str:
    """The best layouts with their step time, and why each loses to the first."""
    rows = [
        (c.layout.label(), fmt.duration(c.step.seconds), fmt.share(c.step.mfu), fmt.share(c.step.bubble_share),
         fmt.share(c.step.communication_share), fmt.size(c.memory.peak), c.reason or "the fastest")
        for c in found.candidates[:most]
    ]  # fmt: skip
    out = "; ".join(f"{number} {reason}" for reason, number in found.rejected.items())
    head = ("layout", "step", "MFU", "bubble", "communication", "memory", "")
    ruled = f'<p class="note">{found.tried} layouts tried. Ruled out: {escape(out or "none")}.</p>'
    return "<h3>Layouts</h3>" + _steps(found, most) + table(head, rows) + ruled


def _steps(found: Search, most: int) -> str:
    """The step of each layout as a bar of what it is spent on."""
    steps = [(c.layout.label(), c.step) for c in found.candidates[:most]]
    if not steps:
        return ""
    scale = (_WIDTH - 20) / max(step.seconds for _, step in steps)
    parts = []
    for row, (label, step) in enumerate(steps):
        x, top = 10.0, 40 + 34 * row
        parts.append(f'<text x="10" y="{top - 3}">{escape(label)}: {escape(fmt.duration(step.seconds))}</text>')
        for color, name in zip(_COLORS, _CAUSES, strict=False):
            width = getattr(step, name) * scale
            parts.append(f'<rect x="{x:.1f}" y="{top}" width="{width:.1f}" height="12" fill="{color}"/>')
            x += width
    for place, (color, name) in enumerate(zip(_COLORS, _CAUSES, strict=False)):
        left = 10 + 150 * place
        parts.append(f'<rect x="{left}" y="0" width="11" height="11" fill="{color}"/>')
        parts.append(f'<text x="{left + 17}" y="10">{name}</text>')
    height = 44 + 34 * len(steps)
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="steps of the layouts">{"".join(parts)}</svg>'


def cost_section(options: Sequence[Option]) -> str:
    """Cost against time of the same run on other hardware and device counts, one line a kind of device."""
    curves = []
    for name in dict.fromkeys(option.hardware for option in options):
        mine = [o for o in options if o.hardware == name and o.cost.on_demand_usd is not None]
        points = [(o.hours, float(o.cost.on_demand_usd or 0)) for o in mine]
        curves.append(Curve(name, points, [f"{o.devices} x {name}" for o in mine]))
    rows = [
        (f"{o.devices} x {o.hardware}", fmt.duration(o.hours * 3600), fmt.money(o.cost.on_demand_usd),
         fmt.money(o.cost.spot_usd), fmt.energy(o.cost.kwh), fmt.mass(o.cost.co2e_kg))
        for o in options
    ]  # fmt: skip
    head = ("devices", "time", "on demand", "spot", "energy", "CO2e")
    drawing = plot(curves, "hours", "USD", log_x=True, log_y=True)
    note = (
        '<p class="note">No spot price: the table has none, or so many devices are interrupted more often than work '
        "is saved.</p>"
        if any(o.cost.spot_usd is None for o in options) else ""
    )  # fmt: skip
    return "<h3>Cost against time</h3>" + drawing + table(head, rows) + note


def returns_section(law: Law | None = None, flops: float | None = None) -> str:
    """Loss against compute by a scaling law, with the budget's point and what the next doublings buy."""
    law, middle = law or Chinchilla(), flops or 1e21
    points = returns(law, [middle * 10 ** (i / 4) for i in range(-8, 9)])
    curve = Curve("compute-optimal", [(p.flops, p.loss) for p in points])
    here = returns(law, [middle])[0]
    drawing = plot([curve, Curve("this budget", [(here.flops, here.loss)])], "FLOPs", "loss (nats)", log_x=True)
    rows = [
        (fmt.flop(p.flops), fmt.number(p.parameters), fmt.number(p.tokens), f"{p.loss:.3f}", f"{p.next_doubling:.3f}")
        for p in points[::4]
    ]
    head = ("budget", "parameters", "tokens", "loss", "next doubling buys")
    return "<h3>Loss against compute</h3>" + drawing + table(head, rows)


def measured_section(differences: Sequence[Difference]) -> str:
    """Predicted against measured, after a run."""
    return "<h3>Predicted against measured</h3>" + table(
        ("", "predicted", "measured", "difference"), [d.row() for d in differences]
    )


def page(title: str, sections: Sequence[str]) -> str:
    """A whole page from sections made by the functions above."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>{''.join(sections)}</html>\n"
    )
