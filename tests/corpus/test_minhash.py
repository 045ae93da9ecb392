"""MinHash kernels against slow twins: shingle sets, Jaccard, how well signatures estimate it, and band sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from corpus_twins import character_shingles, jaccard, shingles
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from modelyard.corpus import dedup
from modelyard.corpus.arrow import buffers
from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.corpus.kernels import minhash

WORDS = st.lists(st.sampled_from(["The", "the", "a_b", "c3", "caf\u00e9", "\u4e2d\u6587", "\u304b", "x"]), max_size=30)
TEXT = st.one_of(
    WORDS.map(" ".join), st.text(alphabet="aB1_ .,-\n\u00e9\u00a0\u2014\u4e2d\u3042\u3001\U0001f600", max_size=60)
)


def sets_of(texts: list[str], n: int, characters: bool = False) -> list[set[int]]:
    values, places = minhash.shingle_sets(*buffers(pa.array(texts, pa.string())), n, characters, minhash.FOLD)
    return [set(values[a:b].tolist()) for a, b in itertools.pairwise(places)]


@settings(max_examples=300, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=5), st.integers(1, 6))
def test_word_shingle_sets_have_the_twins_sizes_and_overlaps(texts: list[str], n: int) -> None:
    ours, twins = sets_of(texts, n), [shingles(t, n) for t in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert len(ours[i] & ours[j]) == len(twins[i] & twins[j]), (texts[i], texts[j])


@settings(max_examples=200, deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=4), st.integers(1, 8))
def test_character_shingle_sets_have_the_twins_overlaps(texts: list[str], n: int) -> None:
    ours, twins = sets_of(texts, n, characters=True), [character_shingles(t, n) for t in texts]
    for i in range(len(texts)):
        for j in range(len(texts)):
            assert len(ours[i] & ours[j]) == len(twins[i] & twins[j]), (texts[i], texts[j])


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_jaccard_is_exact(a: set[int], b: set[int]) -> None:
    values = np.array(sorted(a) + sorted(b), np.uint64)
    assert minhash.jaccard(values, 0, len(a), len(a), len(a) + len(b)) == pytest.approx(jaccard(a, b))


@pytest.mark.parametrize("target", [0.2, 0.5, 0.8, 0.95])
def test_signatures_estimate_jaccard_without_bias(target: float) -> None:
    rng = np.random.default_rng(0)
    a, b = dedup.permutations(MinHashOptions(permutations=512))
    errors = []
    for _ in range(60):
        size = 400
        common = round(2 * size * target / (1 + target))
        pool = rng.choice(2**32, 2 * size, replace=False).astype(np.uint32)
        lows = np.full((2, 512), 0xFFFFFFFF, np.uint32)
        minhash.minima(pool[:size], a, b, lows[0])
        minhash.minima(pool[size - common : 2 * size - common], a, b, lows[1])
        errors.append((lows[0] == lows[1]).mean() - common / (2 * size - common))
    # Standard error of a mean of 60 estimates over 512 permutations: below 0.003.
    assert abs(float(np.mean(errors))) < 0.012


def test_a_signature_does_not_depend_on_the_batch(prose: list[str]) -> None:
    options = MinHashOptions()
    data, offsets = buffers(pa.array(prose[:20]))
    whole, _ = minhash.signatures(data, offsets, 5, False, minhash.FOLD, *dedup.permutations(options))
    for row in (0, 7, 19):
        alone, _ = minhash.signatures(
            *buffers(pa.array([prose[row]])), 5, False, minhash.FOLD, *dedup.permutations(options)
        )
        assert (whole[row] == alone[0]).all()


def test_long_documents_go_through_several_tiles() -> None:
    text = " ".join(str(n) for n in range(20_000))
    options = MinHashOptions(permutations=8)
    a, b = dedup.permutations(options)
    values, counts = minhash.signatures(*buffers(pa.array([text])), 5, False, minhash.FOLD, a, b)
    assert counts.tolist() == [19_996]
    hashes = np.empty(len(text) + 1, np.uint64)
    data, offsets = buffers(pa.array([text]))
    k = minhash.word_shingles(data, offsets[0], offsets[1], 5, minhash.FOLD, hashes)
    x = (hashes[:k] >> np.uint64(32)).astype(np.uint32)
    expected = [(x * a[p] + b[p]).min() for p in range(8)]
    assert values[0].tolist() == expected


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_bands_meet_the_recall_with_the_most_rows(threshold: float) -> None:
    options = MinHashOptions(jaccard=threshold)
    bands, rows = options.bands
    assert bands * rows <= options.permutations
    assert 1 - (1 - threshold**rows) ** bands >= options.recall
    more = options.permutations // (rows + 1)
    assert rows == 32 or 1 - (1 - threshold ** (rows + 1)) ** more < options.recall


def test_texts_without_words_have_no_shingles_and_no_keys() -> None:
    table = pa.table({"id": ["0", "1", "2"], "text": ["...", "", "a word"]})
    keys = dedup.keys(table, dedup.address(3, 3), MinHashOptions())
    assert keys["doc"].to_pylist() == [(3 << 32) + 2]


def test_a_threshold_out_of_range_is_refused() -> None:
    for wrong in ({"jaccard": 0}, {"jaccard": 1.5}, {"permutations": 2}, {"size": 0}):
        with pytest.raises(ValidationError):
            MinHashOptions.model_validate({"method": "minhash", **wrong})
