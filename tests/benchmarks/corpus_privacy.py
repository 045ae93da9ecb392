"""Structured personal data: speed on ordinary text and accuracy on labelled text, against Presidio's patterns.

    python tests/benchmarks/corpus_privacy.py

Labelled text is the presidio-research set in the folder MODELYARD_BENCH_DATA (any *.json with full_text and
spans); without it, sentences with generated entities of known places, by which recall alone means little.
A find counts when its span overlaps a labelled one of the type by half (IoU 0.5). Words that tell a telephone
number were chosen on half of the templates (`template_id`); `held_out` is the other half. Street addresses and
driving licences are reported apart: many labelled addresses are parts of one that no form gives away.

`differences` sets our verdicts beside Presidio's, by type: what both find, and what one finds alone, true or false by
the labels. Presidio brings spaCy with it, so this comparison is made here and not among the tests.
"""

from __future__ import annotations

import json
import os
import random
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from contract import in_turns, report, run_peer, say
from corpus_minhash import documents

from modelyard.corpus import entities
from modelyard.corpus.entities import find
from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.steps.scrub import Scrub

TYPES = {"PHONE_NUMBER": "phone", "CREDIT_CARD": "card", "EMAIL_ADDRESS": "email", "IBAN_CODE": "iban",
         "US_SSN": "ssn", "IP_ADDRESS": "ip"}  # fmt: skip
APART = {"STREET_ADDRESS": "address", "US_DRIVER_LICENSE": "national_id"}
Span = tuple[str, int, int]
PRESIDIO = """
import json, sys, time
import tldextract.tldextract
# Its list of domains from the package, not from the network.
tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
from presidio_analyzer.nlp_engine import NlpArtifacts
from presidio_analyzer.predefined_recognizers import (CreditCardRecognizer, EmailRecognizer, IbanRecognizer,
    IpRecognizer, PhoneRecognizer, UsSsnRecognizer)
speed, labelled = (json.load(open(name)) for name in sys.argv[1:3])
recognizers = [make() for make in (CreditCardRecognizer, EmailRecognizer, IbanRecognizer, IpRecognizer,
    PhoneRecognizer, UsSsnRecognizer)]
def scan(text):
    found = []
    for recognizer in recognizers:
        for r in recognizer.analyze(text, recognizer.supported_entities, None) or []:
            if r.score >= 0.4:
                found.append((r.entity_type, r.start, r.end))
    return found
scan("warm up 8.8.8.8")
start = time.process_time()
for text in speed:
    scan(text)
cpu = time.process_time() - start
print(json.dumps({"cpu": cpu, "found": [scan(text) for text in labelled]}))
"""


def labelled(types: dict[str, str] = TYPES, part: int | None = None) -> list[tuple[str, list[Span]]]:
    """Texts with the places of their entities, in characters; of one half of the templates when `part` is 0 or 1."""
    folder = os.environ.get("MODELYARD_BENCH_DATA")
    found = []
    for path in sorted(Path(folder).rglob("*.json")) if folder else []:
        rows = json.loads(path.read_text())
        if isinstance(rows, list) and rows and "full_text" in rows[0]:
            for row in rows:
                if part is not None and zlib.crc32(str(row.get("template_id")).encode()) % 2 != part:
                    continue
                spans = [
                    (types[s["entity_type"]], s["start_position"], s["end_position"])
                    for s in row["spans"] if s["entity_type"] in types
                ]  # fmt: skip
                found.append((row["full_text"], spans))
    return found or generated()


def generated() -> list[tuple[str, list[Span]]]:
    """Sentences with one entity each."""
    rng = random.Random(1)

    def digits(n: int) -> str:
        return "".join(rng.choice("23456789") for _ in range(n))

    makers: dict[str, Callable[[], str]] = {
        "email": lambda: f"user{digits(3)}@host{digits(2)}.org",
        "phone": lambda: f"({digits(3)}) {digits(3)}-{digits(4)}",
        "ip": lambda: ".".join(str(rng.randint(11, 99)) for _ in range(4)),
        "ssn": lambda: f"{rng.randint(100, 600)}-{rng.randint(10, 99)}-{digits(4)}",
    }
    rows = []
    for _ in range(800):
        kind = rng.choice(list(makers))
        value = makers[kind]()
        rows.append((f"For this use {value}, and no other.", [(kind, 13, 13 + len(value))]))
    return rows


def iou(a: Span, b: Span) -> float:
    """Overlap over union of two spans of the same type, else 0."""
    both = min(a[2], b[2]) - max(a[1], b[1])
    return max(both, 0) / (max(a[2], b[2]) - min(a[1], b[1])) if a[0] == b[0] else 0.0


def accuracy(gold: list[list[Span]], found: list[list[Span]]) -> tuple[float, float, dict[str, list[float]]]:
    """(precision, recall, type -> [precision, recall])."""
    hit: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    given: Counter[str] = Counter()
    for truth, spans in zip(gold, found, strict=True):
        left = list(spans)
        wanted.update(s[0] for s in truth)
        given.update(s[0] for s in spans)
        for span in truth:
            match = next((s for s in left if iou(span, s) >= 0.5), None)
            if match is not None:
                left.remove(match)
                hit[span[0]] += 1
    by_type = {t: [hit[t] / max(given[t], 1), hit[t] / n] for t, n in sorted(wanted.items())}
    return hit.total() / max(given.total(), 1), hit.total() / max(wanted.total(), 1), by_type


def differences(gold: list[list[Span]], ours: list[list[Span]], peer: list[list[Span]]) -> dict[str, dict[str, int]]:
    """Type -> how many finds are `both`'s, and how many one side's alone: labelled (`true`) or not (`false`)."""
    counts: dict[str, Counter[str]] = {}

    def alone(name: str, truth: list[Span], mine: list[Span], other: list[Span]) -> None:
        for span in mine:
            kind = counts.setdefault(span[0], Counter())
            if any(iou(span, s) >= 0.5 for s in other):
                kind["both"] += name == "ours"
            else:
                kind[f"{name}_{'true' if any(iou(span, s) >= 0.5 for s in truth) else 'false'}"] += 1

    for truth, mine, theirs in zip(gold, ours, peer, strict=True):
        alone("ours", truth, mine, theirs)
        alone("peer", truth, theirs, mine)
    return {kind: dict(found) for kind, found in sorted(counts.items())}


def our_spans(texts: list[str], types: dict[str, str] = TYPES) -> list[list[Span]]:
    """Our finds, in characters."""
    found = find(pa.array(texts), frozenset(types.values()), "US")
    out: list[list[Span]] = []
    for row, text in enumerate(texts):
        raw = text.encode()
        out.append([(s.type, len(raw[: s.start].decode()), len(raw[: s.end].decode())) for s in found.get(row, [])])
    return out


def main() -> None:
    """Measures and prints the result line."""
    texts, rows = documents(), labelled()
    size = sum(len(text.encode()) for text in texts) / 1e6
    table: Any = pa.table({"id": [str(n) for n in range(len(texts))], "text": texts})

    def scrub() -> None:
        # What earlier repeats learnt about the same numbers would flatter this one.
        entities._phone_end.cache_clear()
        Scrub(ScrubOptions())(table)

    ours = in_turns({"ours": scrub}, repeats=5)["ours"]
    gold, mine = [spans for _, spans in rows], our_spans([text for text, _ in rows])
    precision, recall, by_type = accuracy(gold, mine)
    sides = {
        name: accuracy([spans for _, spans in side], our_spans([text for text, _ in side], types))
        for name, types, part in (("held_out", TYPES, 1), ("apart", APART, None))
        if (side := labelled(types, part))
    }
    some = [text for text in texts if len(text) < 20_000][:: max(len(texts) // 60, 1)]
    with tempfile.TemporaryDirectory() as folder:
        names = [Path(folder) / "speed.json", Path(folder) / "labelled.json"]
        names[0].write_text(json.dumps(some))
        names[1].write_text(json.dumps([text for text, _ in rows]))
        peers = [run_peer(PRESIDIO, *map(str, names)) for _ in range(3)]
    rates = sorted(sum(len(t.encode()) for t in some) / 1e6 / p["cpu"] for p in peers)
    theirs = [[(TYPES[t], a, b) for t, a, b in spans if t in TYPES] for spans in peers[0]["found"]]
    peer_precision, peer_recall, peer_by_type = accuracy(gold, theirs)
    say(f"{len(rows):,} labelled texts; ours P {precision:.3f} R {recall:.3f}")
    report(
        "corpus_privacy", unit="MB/CPU s", ours=size / ours.cpu_median, peer=rates[1],
        peer_name="Presidio 2.2.366 pattern recognizers", target=35.0, precision=precision, recall=recall,
        peer_precision=peer_precision, peer_recall=peer_recall, by_type=by_type, labelled=len(rows),
        peer_by_type=peer_by_type, differences=differences(gold, mine, theirs),
        **sides,
    )  # fmt: skip


if __name__ == "__main__":
    main()
