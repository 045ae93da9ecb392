"""What came of the documents, for people: report.html, data_card.md and funnel.json.

The page is one file without outside resources; every word from the data is escaped.
"""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from modelyard.corpus.files import read_parquet
from modelyard.corpus.tally import StepTally, Tally
from modelyard.storage import FileRef, join, list_files, write_bytes

_EXAMPLES = 6
_SHOWN = 900
_SCANNED = 64  # parts of the output that are searched for the kept twins of examples


def write_report(
    output: str, name: str, tallies: Sequence[Tally], options: Mapping[str, Any], refs: Sequence[FileRef]
) -> None:
    """Writes the three files below `output`."""
    steps = [step for tally in tallies for step in tally.steps]
    write_bytes(join(output, "funnel.json"), _funnel_json(steps))
    write_bytes(join(output, "data_card.md"), _card(name, steps, tallies[-1], options, refs).encode())
    write_bytes(join(output, "report.html"), _page(output, name, tallies, steps).encode())


def _funnel_json(steps: Sequence[StepTally]) -> bytes:
    return (json.dumps({"steps": [asdict(step) for step in steps]}, indent=1, sort_keys=True) + "\n").encode()


def _page(output: str, name: str, tallies: Sequence[Tally], steps: Sequence[StepTally]) -> str:
    last = tallies[-1]
    examples = sorted((row for t in tallies for row in t.twins), key=lambda r: (-(r["jaccard"] or 0) == -1, r["id"]))
    removed = sorted((row for t in tallies for row in t.removed), key=lambda r: str(r["id"]))
    template = files("modelyard.corpus").joinpath("report_template.html").read_text(encoding="utf-8")
    first, final = steps[0], steps[-1]
    parts = {
        "TITLE": _escape(name),
        "KEPT": f"{final.documents:,}",
        "IN": f"{first.documents_in:,}",
        "SHARE": f"{100 * final.documents / max(first.documents_in, 1):.1f} %",
        "BYTES": _size(final.bytes),
        "BYTES_IN": _size(first.bytes_in),
        "FUNNEL": _funnel(steps),
        "REASONS": _bars(_reasons(steps)),
        "LENGTHS": _histogram(last.lengths),
        "SOURCES": _bars(Counter(last.sources).most_common(12)),
        "ENTITIES": _entities(steps),
        "TWINS": _twins(output, examples[:_EXAMPLES]),
        "SAMPLES_KEPT": _samples(last.kept),
        "SAMPLES_REMOVED": _samples(removed[:12]),
    }
    for key, value in parts.items():
        template = template.replace("{{" + key + "}}", value)
    return template


def _escape(value: object) -> str:
    # Braces too: a text that holds {{TITLE}} must not be taken for a place of the template.
    return html.escape(str(value)).replace("{", "&#123;")


def _size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} TB"


def _reasons(steps: Sequence[StepTally]) -> list[tuple[str, int]]:
    total: Counter[str] = Counter()
    for step in steps:
        total.update(step.reasons)
    return total.most_common(30)


def _funnel(steps: Sequence[StepTally]) -> str:
    whole = max(steps[0].documents_in, 1)
    rows = []
    for step in steps:
        gone = sum(step.reasons.values())
        share = 100 * step.documents / whole
        counts = ", ".join(f"{_escape(k)} {v:,}" for k, v in sorted(step.counts.items()) if "/" not in k)
        rows.append(
            f"<tr><th>{_escape(step.name)}</th><td>{step.documents:,}</td><td class=gone>{'-' if gone else ''}{gone:,}"
            f"</td><td>{_size(step.bytes)}</td><td class=wide><svg viewBox='0 0 100 8' preserveAspectRatio=none>"
            f"<rect class=track width=100 height=8 rx=1 /><rect class=bar width={share:.2f} height=8 rx=1 /></svg></td>"
            f"<td class=note>{counts}</td></tr>"
        )
    head = "<tr><th>step</th><td>documents</td><td>removed</td><td>text</td><td class=wide></td><td></td></tr>"
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _bars(pairs: Sequence[tuple[str, int]]) -> str:
    if not pairs:
        return "<p class=note>none</p>"
    top = max(n for _, n in pairs)
    rows = [
        f"<tr><th>{_escape(name)}</th><td>{n:,}</td><td class=wide><svg viewBox='0 0 100 8' preserveAspectRatio=none>"
        f"<rect class=bar width={max(100 * n / top, 0.4):.2f} height=8 rx=1 /></svg></td></tr>"
        for name, n in pairs
    ]
    return f"<table><tbody>{''.join(rows)}</tbody></table>"


def _histogram(bins: Sequence[int]) -> str:
    filled = [i for i, n in enumerate(bins) if n]
    if not filled:
        return "<p class=note>none</p>"
    low, high, top = filled[0], filled[-1], max(bins)
    width = 600 / (high - low + 1)
    parts = []
    for i in range(low, high + 1):
        x, height = (i - low) * width, 120 * bins[i] / top
        parts.append(
            f"<rect class=bar x={x + 2:.1f} y={130 - height:.1f} width={width - 4:.1f} height={height:.1f} rx=2>"
            f"<title>{_size(2**i)} to {_size(2 ** (i + 1))}: {bins[i]:,}</title></rect>"
            f"<text x={x + width / 2:.1f} y=146>{_size(2**i)}</text>"
            f"<text class=count x={x + width / 2:.1f} y={124 - height:.1f}>{bins[i]:,}</text>"
        )
    return f"<svg class=chart viewBox='0 -14 600 166' role=img>{''.join(parts)}</svg>"


def _entities(steps: Sequence[StepTally]) -> str:
    total: Counter[str] = Counter()
    for step in steps:
        total.update({name: n for name, n in step.counts.items() if "/" in name})
    return _bars([(name.replace("/", ", "), n) for name, n in total.most_common()])


def _kept_texts(output: str, wanted: set[str]) -> dict[str, str]:
    """Texts of some kept documents, from the first parts of the output."""
    found: dict[str, str] = {}
    for name, _ in list(list_files(join(output, "data")))[:_SCANNED]:
        for table in read_parquet(join(output, "data", name), 5000, columns=["id", "text"]):
            for row, key in enumerate(table["id"].to_pylist()):
                if key in wanted:
                    found[key] = table["text"][row].as_py()
        if len(found) == len(wanted):
            break
    return found


def _twins(output: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "<p class=note>none</p>"
    kept = _kept_texts(output, {row["twin"] for row in rows})
    parts = []
    for row in rows:
        twin = kept.get(row["twin"], "(removed by a later step, or beyond the parts searched)")
        parts.append(
            f"<div class=pair><figure><figcaption>removed <code>{_escape(row['id'][:12])}</code> "
            f"{_escape(row['reason'])}, Jaccard {row['jaccard'] or 0:.3f}</figcaption>"
            f"<pre>{_escape(row['text'][:_SHOWN])}</pre></figure><figure><figcaption>kept "
            f"<code>{_escape(row['twin'][:12])}</code></figcaption><pre>{_escape(twin[:_SHOWN])}</pre></figure></div>"
        )
    return "".join(parts)


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in rows:
        why = f" <b>{_escape(row['reason'])}</b>" if row.get("reason") else ""
        place = str(row["source"])
        prompt = f"<pre class=prompt>{_escape(row['prompt'][:300])}</pre>" if row.get("prompt") else ""
        parts.append(
            f"<details><summary>{why} <code>{_escape(_tail(place))}</code></summary>"
            f"{prompt}<pre>{_escape(row['text'][:_SHOWN])}</pre></details>"
        )
    return "".join(parts) or "<p class=note>none</p>"


def _tail(place: str) -> str:
    return "..." + place[-70:] if len(place) > 73 else place


def _card(
    name: str, steps: Sequence[StepTally], last: Tally, options: Mapping[str, Any], refs: Sequence[FileRef]
) -> str:
    first, final = steps[0], steps[-1]
    lines = [
        f"# Data card: {name}", "",
        f"{final.documents:,} documents, {_size(final.bytes)} of text, from {first.documents_in:,} records "
        f"({_size(first.bytes_in)}) in {len(refs):,} files.", "",
        "## Source", "",
        "Inputs as named in the recipe; `source` of every document names its file. Kept documents by suffix: "
        + (", ".join(f"{k} {v:,}" for k, v in Counter(last.sources).most_common(12)) or "none") + ".", "",
        "## Licence", "",
        "Not determined by this stage. The documents keep the licences of their sources.", "",
        "## What was done", "", "| step | documents in | kept | text kept |", "|---|---:|---:|---:|",
        *(f"| {s.name} | {s.documents_in:,} | {s.documents:,} | {_size(s.bytes)} |" for s in steps), "",
        "## Why documents were left out", "", "| reason | documents |", "|---|---:|",
        *(f"| {reason} | {n:,} |" for reason, n in _reasons(steps)), "",
        "Every one has a row in `audit/` with its step and reason, and for duplicates the twin and the similarity.", "",
        "## Personal data", "",
        "Structured entities are handled as the recipe says; names, addresses and free text about people are not "
        "looked for, and `meta` and `source` are left as they came.", "",
        "## Options", "", "```json", json.dumps(options, indent=1, ensure_ascii=False), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)
