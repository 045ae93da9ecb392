"""Who is removed, and rightly? Against the truth of all pairs, on 4,000 documents or what there is.

    python tests/benchmarks/corpus_dedup_quality.py

`recall`: of all pairs with Jaccard at or above the threshold, the share whose documents do not both stay.
`wrongful`: of all removed documents, the share below the threshold to every document that stays. The peer's
rule is datatrove's: documents that share one of 14 bands of 8 MinHash values are joined, and all but one of
a cluster go. It is computed here from our signatures of the same shingles, so that only the rule differs.
`ours` and `peer` are shares of rightful removals.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pyarrow as pa
from contract import report, say
from corpus_minhash import documents

from modelyard.corpus import dedup
from modelyard.corpus.arrow import buffers
from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.corpus.kernels import minhash

THRESHOLD = 0.7
DOCUMENTS = 4000


def all_pairs(sets: list[Any]) -> dict[tuple[int, int], float]:
    """Every pair with a Jaccard similarity of at least THRESHOLD, through an inverted index."""
    index: dict[int, list[int]] = defaultdict(list)
    truth: dict[tuple[int, int], float] = {}
    for d, values in enumerate(sets):
        common: dict[int, int] = defaultdict(int)
        for value in values.tolist():
            for other in index[value]:
                common[other] += 1
            index[value].append(d)
        for other, n in common.items():
            similarity = n / (len(values) + len(sets[other]) - n)
            if similarity >= THRESHOLD:
                truth[other, d] = similarity
    return truth


def peer_removals(values: Any, some: Any) -> set[int]:
    """Documents that datatrove's rule removes: union of all that share a band, the first of a cluster stays."""
    parent = list(range(len(values)))

    def root(x: int) -> int:
        while parent[x] != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for band in range(14):
        first: dict[bytes, int] = {}
        for d in np.flatnonzero(some).tolist():
            other = first.setdefault(values[d, band * 8 : band * 8 + 8].tobytes(), d)
            low, high = sorted((root(other), root(d)))
            parent[high] = low
    return {d for d in range(len(values)) if root(d) != d}


def score(removed: set[int], truth: dict[tuple[int, int], float], documents: int) -> tuple[float, float]:
    """(recall, wrongful) of a set of removed documents."""
    met = sum(a in removed or b in removed for a, b in truth)
    kept = set(range(documents)) - removed
    backed = {a for a, b in truth if b in kept} | {b for a, b in truth if a in kept}
    return met / max(len(truth), 1), len(removed - backed) / max(len(removed), 1)


def main() -> None:
    """Measures and prints the result line."""
    texts = documents(60_000_000)[:DOCUMENTS]
    options = MinHashOptions(jaccard=THRESHOLD)
    column = pa.array(texts)
    table = pa.table({"id": [str(n) for n in range(len(texts))], "text": column})
    found = dedup.candidates(dedup.keys(table, dedup.address(0, len(texts)), options))
    ours = set(dedup.decide(found, column.take(found["doc"]), options)["doc"].to_pylist())
    data, offsets = buffers(column)
    values, places = minhash.shingle_sets(data, offsets, 5, False, minhash.FOLD)
    truth = all_pairs([values[a:b] for a, b in itertools.pairwise(places)])
    say(f"{len(texts):,} documents, {len(truth):,} pairs with J >= {THRESHOLD}, bands {options.bands}")
    signed, counts = minhash.signatures(data, offsets, 5, False, minhash.FOLD, *dedup.permutations(options))
    theirs = peer_removals(signed, counts > 0)
    recall, wrongful = score(ours, truth, len(texts))
    peer_recall, peer_wrongful = score(theirs, truth, len(texts))
    report(
        "corpus_dedup_quality", unit="share of rightful removals", ours=1 - wrongful, peer=1 - peer_wrongful,
        peer_name="LSH and union-find without verification (datatrove's rule)", target=1.0, recall=recall,
        wrongful=wrongful, removed=len(ours), peer_recall=peer_recall, peer_wrongful=peer_wrongful,
        peer_removed=len(theirs), documents=len(texts), pairs=len(truth),
    )  # fmt: skip


if __name__ == "__main__":
    main()
