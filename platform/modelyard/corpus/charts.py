"""Small pieces of HTML for the corpus report: tables, bars, histograms. Every word from the data is escaped."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

NONE = "<p class=note>none</p>"


def escape(value: object) -> str:
    """Text for HTML; braces too, so that a text with {{TITLE}} is not taken for a place of the template."""
    return html.escape(str(value)).replace("{", "&#123;")


def size(value: float) -> str:
    """Bytes in readable decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def count(value: float) -> str:
    """A number in readable units: 12, 3.4 k, 5.6 M."""
    for unit in ("", " k", " M", " G"):
        if value < 1000:
            return f"{value:,.0f}" if not unit else f"{value:,.1f}{unit}"
        value /= 1000
    return f"{value:,.1f} T"


def bar(share: float) -> str:
    """A bar of `share` per cent on a track."""
    return (
        "<svg viewBox='0 0 100 8' preserveAspectRatio=none><rect class=track width=100 height=8 rx=1 />"
        f"<rect class=bar width={share:.2f} height=8 rx=1 /></svg>"
    )


def bars(pairs: Sequence[tuple[str, int]]) -> str:
    """A row with a bar for each (name, number)."""
    if not pairs:
        return NONE
    top = max(n for _, n in pairs)
    rows = [
        f"<tr><th>{escape(name)}</th><td>{n:,}</td><td class=wide><svg viewBox='0 0 100 8' preserveAspectRatio=none>"
        f"<rect class=bar width={max(100 * n / top, 0.4):.2f} height=8 rx=1 /></svg></td></tr>"
        for name, n in pairs
    ]
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def histogram(bins: Sequence[int], labels: Sequence[str], every: int = 1) -> str:
    """Columns from the first filled bin to the last; `labels` are the bins' lower edges and one upper edge.

    Every label is written below, or of more than ten columns each `every` n-th.
    """
    filled = [i for i, n in enumerate(bins) if n]
    if not filled:
        return NONE
    low, high, top = filled[0], filled[-1], max(bins)
    width = 600 / (high - low + 1)
    parts = []
    for i in range(low, high + 1):
        x, height = (i - low) * width, 120 * bins[i] / top
        parts.append(
            f"<rect class=bar x={x + 1.5:.1f} y={130 - height:.1f} width={width - 3:.1f} height={height:.1f} rx=2>"
            f"<title>{labels[i]} to {labels[i + 1]}: {bins[i]:,}</title></rect>"
        )
        if (i - low) % (every if high - low >= 10 else 1) == 0:
            parts.append(f"<text x={x + width / 2:.1f} y=146>{labels[i]}</text>")
            parts.append(f"<text class=count x={x + width / 2:.1f} y={124 - height:.1f}>{count(bins[i])}</text>")
    return f"<svg class=chart viewBox='0 -14 600 166' role=img>{''.join(parts)}</svg>"


def crossed(counts: Mapping[str, int]) -> str:
    """A table of counts named `row/column`: rows by their largest number, columns by name."""
    rows: dict[str, dict[str, int]] = {}
    for name, n in counts.items():
        row, _, column = name.partition("/")
        rows.setdefault(row, {})[column] = rows.get(row, {}).get(column, 0) + n
    if not rows:
        return NONE
    columns = sorted({column for row in rows.values() for column in row})
    head = "".join(f"<td>{escape(column)}</td>" for column in columns)
    order = sorted(rows.items(), key=lambda item: (-max(item[1].values()), item[0]))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{row.get(c, 0):,}</td>' for c in columns)}</tr>"
        for name, row in order
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
