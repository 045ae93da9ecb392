"""What came of the documents, for people: report.html, data_card.md and funnel.json.

The page is one file without outside resources; every word from the data is escaped.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from modelyard.corpus.charts import NONE, bar, bars, count, crossed, escape, histogram, size
from modelyard.corpus.clusters import Cluster, duplicate_clusters
from modelyard.corpus.options import CardOptions
from modelyard.corpus.tally import SCORE_BINS, StepTally, Tally
from modelyard.storage import FileRef, join, write_bytes

REPORTS = ("report.html", "data_card.md", "funnel.json")
BYTES_PER_TOKEN = 4.0  # of UTF-8, to estimate tokens before there is a tokenizer; about right for English prose

_SHOWN = 900
_LENGTHS = [size(2**i) for i in range(33)]
_SCORES = [f"{i / SCORE_BINS:.2f}" for i in range(SCORE_BINS + 1)]
_LANGUAGES = 16


def write_report(
    output: str, name: str, tallies: Sequence[Tally], options: Mapping[str, Any], refs: Sequence[FileRef],
    card: CardOptions,
) -> None:  # fmt: skip
    """Writes the three files below `output`.

    Args:
        output: the artifact's folder, with `data/` and `audit/` in it.
        name: the stage's name.
        tallies: one of each segment, in order.
        options: the stage's options, for the data card.
        refs: the input files.
        card: what the recipe says about the corpus.
    """
    steps = [step for tally in tallies for step in tally.steps]
    write_bytes(join(output, "funnel.json"), _funnel_json(steps, tallies[-1]))
    write_bytes(join(output, "data_card.md"), _card(name, steps, tallies[-1], options, refs, card).encode())
    write_bytes(join(output, "report.html"), _page(output, name, tallies, steps).encode())


def _funnel_json(steps: Sequence[StepTally], last: Tally) -> bytes:
    plain = {
        "steps": [asdict(step) for step in steps], "languages": last.languages, "scores": last.scores,
        "lengths": last.lengths,
    }  # fmt: skip
    return (json.dumps(plain, indent=1, sort_keys=True) + "\n").encode()


def _page(output: str, name: str, tallies: Sequence[Tally], steps: Sequence[StepTally]) -> str:
    last = tallies[-1]
    removed = sorted((row for t in tallies for row in t.removed), key=lambda r: str(r["id"]))
    removed_lengths = [sum(column) for column in zip(*(t.removed_lengths for t in tallies), strict=True)]
    template = files("modelyard.corpus").joinpath("report_template.html").read_text(encoding="utf-8")
    first, final = steps[0], steps[-1]
    parts = {
        "TITLE": escape(name),
        "KEPT": f"{final.documents:,}",
        "IN": f"{first.documents_in:,}",
        "SHARE": f"{100 * final.documents / max(first.documents_in, 1):.1f} %",
        "BYTES": size(final.bytes),
        "BYTES_IN": size(first.bytes_in),
        "TOKENS": count(final.bytes / BYTES_PER_TOKEN),
        "FUNNEL": _funnel(steps),
        "REASONS": bars(_reasons(steps)),
        "LENGTHS": histogram(last.lengths, _LENGTHS),
        "REMOVED_LENGTHS": histogram(removed_lengths, _LENGTHS),
        "SOURCES": bars(Counter(last.sources).most_common(12)),
        "SCORES": _scores(last),
        "LANGUAGES": bars(Counter(last.languages).most_common(_LANGUAGES)),
        "ENTITIES": crossed(_crossed(steps, "scrub")),
        "TABLES": _tables(steps),
        "TWINS": _twins(*duplicate_clusters(output)),
        "SAMPLES_KEPT": _samples(last.kept),
        "SAMPLES_REMOVED": _samples(removed[:12]),
    }
    for key, value in parts.items():
        template = template.replace("{{" + key + "}}", value)
    return template


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
        counts = ", ".join(f"{escape(k)} {v:,}" for k, v in sorted(step.counts.items()) if "/" not in k)
        rows.append(
            f"<tr><th>{escape(step.name)}</th><td>{step.documents:,}</td><td class=gone>{'-' if gone else ''}{gone:,}"
            f"</td><td>{size(step.bytes)}</td><td>{count(step.bytes / BYTES_PER_TOKEN)}</td>"
            f"<td class=wide>{bar(100 * step.documents / whole)}</td><td class=note>{counts}</td></tr>"
        )
    head = (
        "<tr><th>step</th><td>documents</td><td>removed</td><td>text</td><td>tokens, about</td><td></td><td></td></tr>"
    )
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _crossed(steps: Sequence[StepTally], *names: str) -> Counter[str]:
    """The counts `row/column` of the named steps, added up."""
    total: Counter[str] = Counter()
    for step in steps:
        if step.name in names:
            total.update({name: n for name, n in step.counts.items() if "/" in name})
    return total


def _tables(steps: Sequence[StepTally]) -> str:
    """A section for every other step that has counts of the form `row/column`."""
    names = dict.fromkeys(step.name for step in steps if step.name not in ("scrub", "language"))
    found = [(name, counts) for name in names if (counts := _crossed(steps, name))]
    return "".join(
        f"<section><h2>{escape(name.capitalize())}</h2>{crossed(counts)}</section>" for name, counts in found
    )


def _scores(last: Tally) -> str:
    charts = [
        f"<section><h2>{escape(name)} of kept documents</h2>{histogram(bins, _SCORES, 2)}</section>"
        for name, bins in sorted(last.scores.items())
    ]
    return f"<div class=grid>{''.join(charts)}</div>" if charts else ""


def _twins(sizes: Counter[int], clusters: Sequence[Cluster], whole: bool) -> str:
    if not clusters:
        return NONE
    labels = [(f"{n:,} removed", many) for n, many in sorted(sizes.items())[:10]]
    beyond = sum(many for n, many in sorted(sizes.items())[10:])
    labels += [("more", beyond)] if beyond else []
    note = "" if whole else "<p class=note>from the first parts of the audit</p>"
    return f"<h3>Clusters by size</h3>{note}{bars(labels)}<h3>Examples</h3>{''.join(map(_cluster, clusters))}"


def _cluster(cluster: Cluster) -> str:
    kept = "(removed by a later step, or beyond the parts searched)" if cluster.kept is None else cluster.kept
    figures = [
        f"<figure><figcaption>kept <code>{escape(cluster.twin[:12])}</code>, {cluster.size:,} removed</figcaption>"
        f"<pre>{escape(kept[:_SHOWN])}</pre></figure>"
    ]
    figures += [
        f"<figure><figcaption>removed <code>{escape(row['id'][:12])}</code> {escape(row['reason'])}, Jaccard "
        f"{row['jaccard'] or 0:.3f}</figcaption><pre>{escape((row['text'] or '')[:_SHOWN])}</pre></figure>"
        for row in cluster.removed
    ]
    return f"<div class=pair>{''.join(figures)}</div>"


def _samples(rows: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for row in rows:
        why = f" <b>{escape(row['reason'])}</b>" if row.get("reason") else ""
        prompt = f"<pre class=prompt>{escape(row['prompt'][:300])}</pre>" if row.get("prompt") else ""
        parts.append(
            f"<details><summary>{why} <code>{escape(_tail(str(row['source'])))}</code></summary>"
            f"{prompt}<pre>{escape(row['text'][:_SHOWN])}</pre></details>"
        )
    return "".join(parts) or NONE


def _tail(place: str) -> str:
    return "..." + place[-70:] if len(place) > 73 else place


def _card(
    name: str, steps: Sequence[StepTally], last: Tally, options: Mapping[str, Any], refs: Sequence[FileRef],
    card: CardOptions,
) -> str:  # fmt: skip
    first, final = steps[0], steps[-1]
    lines = [
        f"# Data card: {card.title or name}", "",
        *([card.description, ""] if card.description else []),
        f"{final.documents:,} documents, {size(final.bytes)} of text (about {count(final.bytes / BYTES_PER_TOKEN)} "
        f"tokens), from {first.documents_in:,} records ({size(first.bytes_in)}) in {len(refs):,} files.", "",
        "## Source", "",
        *([card.source, ""] if card.source else []),
        "Inputs as named in the recipe; `source` of every document names its file. Kept documents by suffix: "
        + (", ".join(f"{k} {v:,}" for k, v in Counter(last.sources).most_common(12)) or "none") + ".", "",
        "## Licence", "",
        card.licence or "Not stated in the recipe (`card.licence`). The documents keep the licences of their sources.",
        "", "## Languages", "", *_card_languages(last), "",
        "## What was done", "", "| step | documents in | kept | text kept |", "|---|---:|---:|---:|",
        *(f"| {s.name} | {s.documents_in:,} | {s.documents:,} | {size(s.bytes)} |" for s in steps), "",
        "## Why documents were left out", "", "| reason | documents |", "|---|---:|",
        *(f"| {reason} | {n:,} |" for reason, n in _reasons(steps)), "",
        "Every one has a row in `audit/` with its step and reason, and for duplicates the twin and the similarity.", "",
        "## Personal data", "",
        *_card_entities(steps), "",
        "## Options", "", "```json", json.dumps(options, indent=1, ensure_ascii=False), "```", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _card_languages(last: Tally) -> list[str]:
    if not last.languages:
        return ["Not determined: the recipe has no `language` step."]
    rows = [f"| {code} | {n:,} |" for code, n in Counter(last.languages).most_common(_LANGUAGES)]
    return ["| language | documents |", "|---|---:|", *rows]


def _card_entities(steps: Sequence[StepTally]) -> list[str]:
    counts = _crossed(steps, "scrub")
    if not any(step.name == "scrub" for step in steps):
        return ["Not looked for: the recipe has no `scrub` step."]
    rows = [f"| {kind} | {action} | {n:,} |" for (kind, action), n in _pairs(counts)]
    said = "Found by form and checksum, and treated as the recipe says; free text about people may remain."
    return [said, "", "| type | what was done | number |", "|---|---|---:|", *rows]


def _pairs(counts: Counter[str]) -> list[tuple[tuple[str, str], int]]:
    return [((name.split("/", 1)[0], name.split("/", 1)[1]), n) for name, n in counts.most_common()]
