"""Deduplication: exact and verified, in process and phase by phase, against the truth of all pairs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from corpus_twins import jaccard, removals, shingles
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.corpus import dedup, stars
from modelyard.corpus.dedup_options import ExactOptions, MinHashOptions

VOCABULARY = [f"word{n}" for n in range(400)]


def table_of(texts: list[str], **columns: Any) -> pa.Table:
    return pa.table({"id": [f"id{n}" for n in range(len(texts))], "text": texts, **columns})


def decide(texts: list[str], options: MinHashOptions, **columns: Any) -> dict[int, tuple[int, float]]:
    """Document -> (twin, similarity), by the local way through the phases."""
    table = table_of(texts, **columns)
    keys = dedup.candidates(dedup.keys(table, dedup.address(0, len(texts)), options))
    if not keys.num_rows:
        return {}
    found = dedup.decide(keys, table["text"].take(keys["doc"]), options)
    return {row["doc"]: (int(row["twin"][2:]), row["jaccard"]) for row in found.to_pylist()}


def edited(words: list[str], rate: float, rng: random.Random) -> list[str]:
    return [rng.choice(VOCABULARY) if rng.random() < rate else word for word in words]


@pytest.fixture(scope="module")
def planted() -> list[str]:
    """600 texts: 200 originals, and two copies of each with up to 12 % of the words changed."""
    rng = random.Random(5)
    originals = [[rng.choice(VOCABULARY) for _ in range(rng.randint(40, 200))] for _ in range(200)]
    copies = [edited(words, rng.choice([0, 0.01, 0.02, 0.05, 0.12]), rng) for words in originals for _ in range(2)]
    texts = [" ".join(words) for words in [*originals, *copies]]
    rng.shuffle(texts)
    return texts


def test_planted_duplicates_go_as_the_truth_of_all_pairs_says(planted: list[str]) -> None:
    options = MinHashOptions(jaccard=0.7)
    sets = [shingles(text, 5) for text in planted]
    truth, ours = removals(sets, 0.7), decide(planted, options)
    kept = set(range(len(planted))) - set(ours)
    for gone, (twin, similarity) in ours.items():
        assert twin in kept, "removed against a document that is gone itself"
        assert similarity == pytest.approx(jaccard(sets[gone], sets[twin])) and similarity >= 0.7
    assert len(set(truth) & set(ours)) / len(truth) >= 0.98


def test_a_chain_of_small_steps_removes_only_near_copies_of_what_stays() -> None:
    rng = random.Random(1)
    words = [rng.choice(VOCABULARY) for _ in range(100)]
    chain = [" ".join(words)]
    for step in range(30):
        words[step * 3] = f"changed{step}"
        chain.append(" ".join(words))
    sets = [shingles(text, 5) for text in chain]
    assert jaccard(sets[0], sets[-1]) < 0.2
    ours = decide(chain, MinHashOptions(jaccard=0.8))
    assert ours and len(ours) < 30
    for gone, (twin, _) in ours.items():
        assert twin not in ours and jaccard(sets[gone], sets[twin]) >= 0.8


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab ", min_size=1, max_size=14), min_size=2, max_size=25))
def test_equal_shingle_sets_always_meet(texts: list[str]) -> None:
    ours = decide(texts, MinHashOptions(jaccard=1.0, size=2))
    sets = [shingles(text, 2) for text in texts]
    assert set(ours) == set(removals(sets, 1.0))


def test_keep_rules_choose_who_stays() -> None:
    words = [f"w{n}" for n in range(60)]
    short, long, other = " ".join(words), " ".join([*words, "tail", "more"]), " ".join(["zz", *words])
    assert set(decide([short, long, other], MinHashOptions(keep="first"))) == {1, 2}
    assert set(decide([short, long, other], MinHashOptions(keep="longest"))) == {0, 2}
    quality = pa.array([0.1, 0.2, 0.9], pa.float32())
    assert set(decide([short, long, other], MinHashOptions(keep="quality"), quality=quality)) == {0, 1}


def test_exact_keeps_the_first_and_names_it() -> None:
    table = table_of(["a", "b", "a", "c", "b", "a"])
    found = dedup.equal(dedup.keys(table, dedup.address(2, 6), ExactOptions()))
    base = 2 << 32
    assert [(r["doc"] - base, r["twin"], r["jaccard"]) for r in found.to_pylist()] == [
        (2, "id0", 1.0), (4, "id1", 1.0), (5, "id0", 1.0)
    ]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_components_equal_a_plain_search(pairs: list[tuple[int, int]]) -> None:
    small = np.array([min(p) for p in pairs], np.int64)
    large = np.array([max(p) for p in pairs], np.int64)
    found = dedup.components(small, large)
    labels = dict(zip(found["doc"].to_pylist(), found["component"].to_pylist(), strict=True))
    neighbours: dict[int, set[int]] = {}
    for x, y in pairs:
        neighbours.setdefault(x, set()).add(y)
        neighbours.setdefault(y, set()).add(x)
    for start in neighbours:
        reached, queue = {start}, [start]
        while queue:
            for other in neighbours[queue.pop()] - reached:
                reached.add(other)
                queue.append(other)
        assert labels[start] == min(reached)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60), st.integers(1, 4))
def test_stars_over_partitions_find_the_same_components(pairs: list[tuple[int, int]], parts: int) -> None:
    small, large = (np.array([f(p) for p in pairs if p[0] != p[1]], np.int64) for f in (min, max))
    edges, before, rounds = stars.distinct(small, large), -1, 0

    def step(edges: pa.Table, around: Any, star: Any) -> pa.Table:
        rows = around(edges, parts)
        own = [star(rows.filter(pa.compute.equal(rows["p"], p)).drop_columns(["p"])) for p in range(parts)]
        return pa.concat_tables(own)

    while stars.total(edges) != before:
        before, rounds = stars.total(edges), rounds + 1
        edges = step(step(edges, stars.around_both, stars.large_star), stars.around_large, stars.small_star)
    found = stars.labels(edges).sort_by("doc")
    assert found.to_pydict() == dedup.components(small, large).sort_by("doc").to_pydict() and rounds < 12


def test_what_chain_and_estimate_risk(planted: list[str]) -> None:
    rng = random.Random(1)
    words = [rng.choice(VOCABULARY) for _ in range(100)]
    chain = [" ".join(words)]
    for step in range(30):
        words[step * 3] = f"changed{step}"
        chain.append(" ".join(words))
    ours = decide(chain, MinHashOptions(jaccard=0.8, verify="chain"))
    sets = [shingles(text, 5) for text in chain]
    assert {twin for twin, _ in ours.values()} == {0} and len(ours) == 30
    assert all(similarity == pytest.approx(jaccard(sets[0], sets[gone])) for gone, (_, similarity) in ours.items())
    # On pairs far from the threshold all three agree; the estimate is near the truth.
    texts = [text for pair in zip(planted[:40], planted[:40], strict=True) for text in pair]
    for verify in ("kept", "chain"):
        assert set(decide(texts, MinHashOptions(verify=verify))) >= set(range(1, 80, 2))
    keys = dedup.candidates(dedup.keys(table_of(texts), dedup.address(0, 80), MinHashOptions(verify="estimate")))
    found = dedup.decide_unseen(keys, MinHashOptions(verify="estimate")).to_pylist()
    assert {row["doc"] for row in found} >= set(range(1, 80, 2))
    assert all(row["jaccard"] == 1.0 for row in found if row["doc"] % 2 and row["twin"] == f"id{row['doc'] - 1}")


def test_phases_over_partitions_decide_as_one_process_does(planted: list[str]) -> None:
    options = MinHashOptions(jaccard=0.7)
    table = table_of(planted)
    keys = dedup.keys(table, dedup.address(0, len(planted)), options)
    matrix = dedup.key_matrix(keys)
    flat, docs = matrix.reshape(-1), np.repeat(keys["doc"].to_numpy(), matrix.shape[1])
    edges = [dedup.edges(pa.table({"key": flat[flat % 5 == p], "doc": docs[flat % 5 == p]})) for p in range(5)]
    joined = pa.concat_tables(edges)
    labels = dedup.components(joined["small"].to_numpy(), joined["large"].to_numpy())
    component = dict(zip(labels["doc"].to_pylist(), labels["component"].to_pylist(), strict=True))
    decisions = []
    for p in range(3):
        rows = [n for n, doc in enumerate(keys["doc"].to_pylist()) if doc in component and component[doc] % 3 == p]
        part = keys.take(pa.array(rows[::-1], pa.int64()))
        decisions.append(dedup.decide(part, table["text"].take(part["doc"]), options))
    found = pa.concat_tables(decisions).sort_by("doc")
    ours = {row["doc"]: (int(row["twin"][2:]), row["jaccard"]) for row in found.to_pylist()}
    assert ours == decide(planted, options)
