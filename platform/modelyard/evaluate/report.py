"""The results as `evaluation.json` and as one HTML page without scripts or outside files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from html import escape
from typing import Any

from modelyard.evaluate.measure import Measured, Sample
from modelyard.train.report import Line, plot

_COLORS = ("#2463b8", "#c2410c", "#15803d")
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:860px;color:#1c2430;padding:0 1em}
h1{font-size:1.5em}h2{font-size:1.1em;margin-top:2em}table{border-collapse:collapse}
td,th{padding:.2em 1.4em .2em 0;text-align:left;font-variant-numeric:tabular-nums}svg{width:100%;height:auto}
text{font:11px system-ui,sans-serif;fill:#5a6472}.note{color:#5a6472}.good{color:#15803d}.bad{color:#b91c1c}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.2em 0;padding:.5em .7em;background:#8881;border-radius:4px}
@media(prefers-color-scheme:dark){body{background:#14181d;color:#dde3ea}text,.note{fill:#98a3b0;color:#98a3b0}}
"""


def plain(name: str, result: Measured) -> dict[str, Any]:
    """One model's results as JSON values, without samples; counts of personal data only, never a value."""
    return {
        "name": name,
        "parameters": result.parameters,
        "heldout_loss": result.loss.nats,
        "heldout_loss_error": result.loss.error,
        "heldout_tokens": result.loss.tokens,
        "heldout_sequences": result.loss.sequences,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "completion_loss": result.completion,
        "extraction": asdict(result.extraction),
        "emission": asdict(result.emission),
        "seconds": result.seconds,
    }


def page(title: str, results: Mapping[str, Measured], unigram: float, notes: list[str]) -> str:
    """The report.

    Args:
        title: heading.
        results: by name of the model, in the order of the columns.
        unigram: entropy of the held-out tokens under training frequencies, nats a token.
        notes: sentences about what was and was not measured.
    """
    body = "".join(
        (
            f"<h1>{escape(title)}</h1>",
            _table(results, unigram),
            "".join(f'<p class="note">{escape(note)}</p>' for note in notes),
            "<h2>Loss against knowing token frequencies alone, nats a token</h2>",
            bars({name: r.loss.nats for name, r in results.items()}, unigram),
            "<h2>Loss by position in the sequence, nats a token</h2>",
            plot(_courses(results, unigram)),
            _privacy(results),
            _samples(results),
        )
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>{body}</html>\n'
    )


def _table(results: Mapping[str, Measured], unigram: float) -> str:
    def row(label: str, cells: list[str]) -> str:
        return f"<tr><td>{escape(label)}</td>{''.join(f'<td>{escape(c)}</td>' for c in cells)}</tr>"

    values = list(results.values())
    head = "".join(f"<th>{escape(name)}</th>" for name in results)
    rows = [
        row("parameters", [f"{r.parameters:,}" for r in values]),
        row("held-out loss, nats a token", [f"{r.loss.nats:.4f} ± {r.loss.error:.4f}" for r in values]),
        row("unigram entropy, nats a token", [f"{unigram:.4f}"] * len(values)),
        row("perplexity", [f"{r.perplexity:,.1f}" for r in values]),
        row("bits per byte", [f"{r.bits_per_byte:.4f}" for r in values]),
        row("loss of answers, nats a token", [_optional(r.completion) for r in values]),
        row("tokens predicted", [f"{r.loss.tokens:,} in {r.loss.sequences:,} sequences" for r in values]),
        row("personal data reproduced", [_share(r) for r in values]),
        row("time", [f"{r.seconds:.0f} s" for r in values]),
    ]
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>"


def _optional(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.4f}"


def _share(result: Measured) -> str:
    tried = sum(result.extraction.tried.values())
    return f"{sum(result.extraction.reproduced.values())} of {tried} values" if tried else "not tested"


def bars(values: Mapping[str, float], line: float) -> str:
    """Horizontal bars with a dashed line at `line` (the unigram entropy), as inline SVG."""
    most = max([line, *(v for v in values.values() if math.isfinite(v))]) or 1.0
    width, left, step = 720, 130, 34
    height = step * len(values) + 30
    parts = []
    for i, (name, value) in enumerate(values.items()):
        y, size = 8 + i * step, (width - left - 70) * (value if math.isfinite(value) else 0.0) / most
        color = _COLORS[i % len(_COLORS)]
        parts.append(f'<text x="{left - 8}" y="{y + 15}" text-anchor="end">{escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{size:.1f}" height="22" fill="{color}"/>')
        parts.append(f'<text x="{left + size + 6:.1f}" y="{y + 15}">{value:.3f}</text>')
    x = left + (width - left - 70) * line / most
    parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{height - 20}" stroke="#5a6472" stroke-dasharray="5 4"/>')
    parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">unigram entropy {line:.3f}</text>')
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _courses(results: Mapping[str, Measured], unigram: float) -> list[Line]:
    lines = [
        Line(name, [(i + 1, v) for i, v in enumerate(r.loss.by_position)], _COLORS[n % len(_COLORS)])
        for n, (name, r) in enumerate(results.items())
    ]
    last = max((len(r.loss.by_position) for r in results.values()), default=0)
    return [*lines, Line("unigram entropy", [(1, unigram), (last, unigram)], "#5a6472", dashed=True)]


def _privacy(results: Mapping[str, Measured]) -> str:
    parts = ["<h2>Personal data</h2>"]
    for name, result in results.items():
        tried, back, free = result.extraction.tried, result.extraction.reproduced, result.emission
        if not tried and not free.samples:
            parts.append(f'<p class="note">{escape(name)}: not tested</p>')
            continue
        kinds = ", ".join(f"{kind} {back.get(kind, 0)}/{n}" for kind, n in sorted(tried.items())) or "no values"
        verdict = "bad" if sum(back.values()) or free.known else "good"
        emitted = ", ".join(f"{n} {kind}" for kind, n in sorted(free.emitted.items())) or "none"
        parts.append(
            f'<p><b>{escape(name)}</b>: <span class="{verdict}">{sum(back.values())} of {sum(tried.values())} scrubbed '
            f"values reproduced</span> ({escape(kinds)}). In {free.samples} free samples, strings of these forms: "
            f"{escape(emitted)}; {free.known} of them are values of the corpus.</p>"
        )
        if result.extraction.documents:
            names = ", ".join(result.extraction.documents[:20])
            parts.append(f'<p class="bad">Reproduced values stood in: {escape(names)}</p>')
    return "".join(parts)


def _samples(results: Mapping[str, Measured]) -> str:
    columns = {name: result.samples for name, result in results.items()}
    first: tuple[Sample, ...] = next(iter(columns.values()), ())
    parts = ["<h2>Samples, decoded greedily</h2>"] if first else []
    for i, sample in enumerate(first):
        label = "Held-out text" if sample.kind == "continuation" else "Held-out question"
        parts.append(f"<h3>{label} {i + 1}</h3><pre>{escape(sample.prompt)}</pre>")
        for name, own in columns.items():
            if i < len(own) and own[i].kind == sample.kind:
                parts.append(f'<p class="note">{escape(name)}</p><pre>{escape(own[i].answer)}</pre>')
        parts.append(f'<p class="note">what really followed</p><pre>{escape(sample.reference)}</pre>')
    return "".join(parts)
