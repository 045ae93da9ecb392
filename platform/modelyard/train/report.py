"""The report of a training run: one HTML page without scripts or outside files, and the same as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _BOTTOM = 720, 260, 64, 18, 28
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:760px;color:#1c2430;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.15em 1.2em .15em 0;text-align:left;vertical-align:top;overflow-wrap:anywhere}th{font-weight:500}
td{font-variant-numeric:tabular-nums}svg{width:100%;height:auto}.wide{overflow-x:auto}
text{font:11px system-ui,sans-serif;fill:#5a6472}.note{color:#5a6472}
@media(prefers-color-scheme:dark){body{background:#14181d;color:#dde3ea}text,.note{fill:#98a3b0;color:#98a3b0}}
"""


@dataclass(frozen=True)
class Line:
    """One line of a plot."""

    name: str
    points: Points
    color: str = "#2463b8"
    dashed: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def html(self) -> str:
        """The title and the table."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        rows = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f'<h2>{escape(self.title)}</h2><div class="wide"><table><tr>{head}</tr>{rows}</table></div>'

    def markdown(self) -> str:
        """The same as a Markdown section."""
        lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (self.header, *self.rows)]
        lines.insert(1, "|" + "---|" * len(self.header))
        return f"## {self.title}\n\n" + "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot end a Markdown cell, its row, or become markup."""
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|") or " "


@dataclass(frozen=True)
class Page:
    """What a report shows: facts as (name, value), plots as (title, lines), tables, and notes."""

    title: str
    facts: Sequence[tuple[str, str]]
    plots: Sequence[tuple[str, Sequence[Line]]] = ()
    notes: Sequence[str] = field(default_factory=tuple)
    tables: Sequence[Table] = ()

    def html(self) -> str:
        """The whole page."""
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in self.facts)
        plots = "".join(f"<h2>{escape(title)}</h2>{plot(lines)}" for title, lines in self.plots)
        tables = "".join(table.html() for table in self.tables)
        notes = "".join(f'<p class="note">{escape(note)}</p>' for note in self.notes)
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(self.title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
            f"<h1>{escape(self.title)}</h1><table>{rows}</table>{plots}{tables}{notes}</html>\n"
        )

    def markdown(self) -> str:
        """The same for a terminal or a merge request; of each plot its first and last values."""
        facts = Table("Facts", ("", ""), self.facts).markdown()
        ends = [(title, line) for title, lines in self.plots for line in lines if line.points]
        plots = [
            (f"{title}: {line.name}", _short(line.points[0][1]), _short(line.points[-1][1])) for title, line in ends
        ]
        parts = [f"# {self.title}\n", facts, Table("Curves", ("", "first", "last"), plots).markdown() if plots else ""]
        parts += [table.markdown() for table in self.tables]
        return "\n".join(filter(None, [*parts, *(f"{note}\n" for note in self.notes)]))


def thin(points: Points, most: int = 600) -> list[tuple[float, float]]:
    """At most `most` finite points, each the mean of a run of neighbours."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, math.ceil(len(finite) / most))
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def plot(lines: Sequence[Line]) -> str:
    """Lines over a common axis as inline SVG, the legend included; a line of text when there is nothing to draw."""
    drawn = [(line, thin(line.points)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return '<p class="note">nothing to draw</p>'
    xs = [x for _, points in drawn for x, _ in points]
    ys = [y for _, points in drawn for _, y in points]
    box = _Box(min(xs), max(xs), *_padded(min(ys), max(ys)))
    parts = [*(_grid(box)), *(_path(box, line, points) for line, points in drawn), *_legend([ln for ln, _ in drawn])]
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg>'


def _padded(low: float, high: float) -> tuple[float, float]:
    pad = (high - low) * 0.05 or max(abs(high) * 0.05, 1e-6)
    return low - pad, high + pad


@dataclass(frozen=True)
class _Box:
    """Maps data to the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return _LEFT + (value - self.x0) / ((self.x1 - self.x0) or 1) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return 8 + (self.y1 - value) / (self.y1 - self.y0) * (_HEIGHT - _BOTTOM - 8)


def _grid(box: _Box) -> list[str]:
    found = []
    for i in range(5):
        value = box.y0 + (box.y1 - box.y0) * i / 4
        y = box.y(value)
        found.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#8884"/>')
        found.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for i in range(5):
        value = box.x0 + (box.x1 - box.x0) * i / 4
        found.append(f'<text x="{box.x(value):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{_short(value)}</text>')
    return found


def _path(box: _Box, line: Line, points: Points) -> str:
    if len(points) == 1:
        x, y = points[0]
        return f'<circle cx="{box.x(x):.1f}" cy="{box.y(y):.1f}" r="3" fill="{line.color}"/>'
    route = " ".join(f"{box.x(x):.1f},{box.y(y):.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<polyline points="{route}" fill="none" stroke="{line.color}" stroke-width="1.6"{dash}/>'


def _legend(lines: Sequence[Line]) -> list[str]:
    found = []
    for i, line in enumerate(lines):
        y = 20 + 16 * i
        found.append(f'<rect x="{_WIDTH - 190}" y="{y - 8}" width="10" height="10" fill="{line.color}"/>')
        found.append(f'<text x="{_WIDTH - 175}" y="{y + 1}">{escape(line.name)}</text>')
    return found


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.4g}"
