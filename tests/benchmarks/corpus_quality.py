"""All heuristic rule sets in one pass against datatrove's four filters, and how often the verdicts agree.

    python tests/benchmarks/corpus_quality.py

Both sides see the same text and white-space words (datatrove's word and sentence splitters are set to
`str.split` and to our sentence rule's regular expression), so that a difference is one of the rules. A
verdict is whether any of Gopher quality, Gopher repetition, C4 and FineWeb drops the document.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
from contract import in_turns, report, run_peer, say
from corpus_minhash import documents

from modelyard.corpus.options import QualityOptions
from modelyard.corpus.step import reasons_from
from modelyard.corpus.steps.quality import Quality

DATATROVE = r"""
import json, re, sys, time
from datatrove.data import Document
from datatrove.pipeline.filters import (c4_filters, fineweb_quality_filter, gopher_quality_filter,
    gopher_repetition_filter)
texts = json.load(open(sys.argv[1]))
END = re.compile(r'''(?<=[.?!])["')\]]* +(?=["'( ]*[A-Z0-9\x80-\U0010ffff])''')
for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
    module.split_into_words = lambda text, language: text.split()
c4_filters.split_into_sentences = lambda text, language: [s for s in END.split(text) if s.strip()]
filters = [
    ("gopher", gopher_quality_filter.GopherQualityFilter()),
    ("gopher", gopher_repetition_filter.GopherRepetitionFilter()),
    ("c4", c4_filters.C4QualityFilter(remove_citations=False)),
    ("fineweb", fineweb_quality_filter.FineWebQualityFilter()),
]
def judge(filter, text):
    # An empty division means the peer would stop the whole pipeline: counted as a drop.
    try:
        result = filter.filter(Document(text=text, id="0"))
    except ZeroDivisionError:
        return "error"
    return None if result is True else (result[1] if isinstance(result, tuple) else "dropped")
judge(filters[0][1], "warm up")
start = time.process_time()
verdicts = [[judge(filter, text) for _, filter in filters] for text in texts]
print(json.dumps({"cpu": time.process_time() - start, "verdicts": verdicts}))
"""


def ours_by_set(texts: list[str]) -> list[list[str | None]]:
    """Our reason of each rule set for each text, each set judged alone."""
    found = []
    for rules in ("gopher", "c4", "fineweb"):
        step = Quality(QualityOptions.model_validate({"rules": [rules]}))
        verdicts = step.judge(step.statistics(pa.array(texts)), len(texts))
        found.append(reasons_from(verdicts.masks, len(texts)).to_pylist())
    return [list(row) for row in zip(*found, strict=True)]


def main() -> None:
    """Measures and prints the result line."""
    texts = documents()
    column = pa.array(texts)
    size = sum(len(text.encode()) for text in texts) / 1e6
    step = Quality(QualityOptions())
    ours = in_turns({"ours": lambda: [step.judge(step.statistics(column), len(texts)) for _ in range(3)]}, repeats=5)
    some = texts[:: max(len(texts) // 400, 1)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.json"
        path.write_text(json.dumps(some))
        peers = [run_peer(DATATROVE, str(path)) for _ in range(3)]
    rates = sorted(sum(len(t.encode()) for t in some) / 1e6 / p["cpu"] for p in peers)
    agreement, by_set, causes = compare(ours_by_set(some), peers[0]["verdicts"])
    for cause, n in causes.most_common(12):
        say(f"  differs: {cause}: {n}")
    rate = 3 * size / ours["ours"].cpu_median
    report(
        "corpus_quality", unit="MB/CPU s", ours=rate, peer=rates[1], peer_name="datatrove 0.10.1, words by str.split",
        target=10.0, agreement=agreement, agreement_by_set=by_set, compared=len(some), differences=dict(causes),
    )  # fmt: skip


def compare(ours: list[list[str | None]], theirs: list[list[str | None]]) -> tuple[float, float, Counter[str]]:
    """Share of documents on whose fate both agree, the same by rule set, and what the others differ in."""
    causes: Counter[str] = Counter()
    same, verdicts = 0, 0
    for mine, other in zip(ours, theirs, strict=True):
        peer: list[Any] = [other[0] or other[1], other[2], other[3]]
        verdicts += sum(bool(m) == bool(p) for m, p in zip(mine, peer, strict=True))
        if any(mine) == any(peer):
            same += 1
            continue
        causes[f"{next((m for m in mine if m), 'kept')} / {next((p for p in peer if p), 'kept')}"] += 1
    return same / len(ours), verdicts / 3 / len(ours), causes


if __name__ == "__main__":
    main()
