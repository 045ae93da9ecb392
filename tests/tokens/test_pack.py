"""Packing: no token lost or invented, boundaries where documents begin, order by hash alone."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.tokens.pack import Buckets, by_bucket, encode_table, in_sample, pack, pack_table, unit_hashes
from modelyard.tokens.statistics import token_counts, unigram_entropy
from modelyard.tokens.tokenizer import Encoder, save_tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["some words to merge some words"] * 5, 300), folder)
    return Encoder.open(folder)


@given(lengths=st.lists(st.integers(1, 30), max_size=20), length=st.integers(1, 16), keep=st.booleans())
@settings(deadline=None)
def test_packing_keeps_the_stream(lengths: list[int], length: int, keep: bool) -> None:
    total = sum(lengths)
    stream = np.arange(1, total + 1, dtype=np.uint16)
    packed = pack(stream, np.array(lengths, dtype=np.int64), length, pad_id=0, keep_tail=keep)
    assert packed.tokens.shape == packed.starts.shape == (len(packed.lengths), length)
    flat, rows = packed.tokens.reshape(-1), len(packed)
    kept = total if keep else total // length * length
    assert np.array_equal(flat[:kept], stream[:kept]) and not flat[kept:].any()
    assert packed.lengths.sum() == kept and rows == (-(-total // length) if keep else total // length)
    begins = np.cumsum([0, *lengths[:-1]]) if lengths else np.array([], dtype=int)
    assert np.flatnonzero(packed.starts).tolist() == [b for b in begins if b < rows * length]


def _documents(n: int) -> pa.Table:
    return pa.table({"id": [f"doc-{i}" for i in range(n)], "text": [f"some words {i}" * (i % 5) for i in range(n)]})


def test_order_of_arrival_does_not_matter(encoder: Encoder) -> None:
    buckets, documents = Buckets(0.2, 3, 2), _documents(300)
    shuffled = documents.take(np.random.default_rng(0).permutation(300))
    results = []
    for table in (documents, shuffled):
        parts = by_bucket(encode_table(table, encoder, buckets), buckets.total)
        results.append([pack_table(part, 8, encoder.pad_id, True) for part in parts])
    for a, b in zip(*results, strict=True):
        assert np.array_equal(a.tokens, b.tokens) and np.array_equal(a.starts, b.starts)


def test_documents_without_text_are_left_out_and_bytes_are_utf8(encoder: Encoder) -> None:
    table = encode_table(pa.table({"id": ["a", "b", "c"], "text": ["é", "", None]}), encoder, Buckets(0.0, 1, 1))
    assert table["id"].to_pylist() == ["a"]
    assert table["bytes"].to_pylist() == [2]
    assert table["tokens"].to_pylist()[0][-1] == encoder.end_id


def test_split_is_by_document_and_near_the_share_asked() -> None:
    ids = [str(i) for i in range(20_000)]
    buckets = Buckets(0.1, 4, 2)
    assigned = buckets.assign(ids)
    held = assigned >= 4
    assert 0.09 < held.mean() < 0.11
    assert set(assigned.tolist()) == set(range(6))
    assert not (held & in_sample(ids, 1.0, 0.1)).any()
    assert np.array_equal(in_sample(ids, 1.0, 0.1), ~held)
    assert 0.44 < in_sample(ids, 0.5, 0.1).mean() < 0.46


def test_a_larger_share_holds_out_a_superset() -> None:
    ids = [str(i) for i in range(2000)]
    small, large = (Buckets(share, 1, 1).assign(ids) for share in (0.05, 0.1))
    assert ((small == 1) <= (large == 1)).all()


@given(ids=st.lists(st.text(), max_size=50))
@settings(deadline=None)
def test_unit_hashes_lie_in_the_unit_interval(ids: list[str]) -> None:
    values = unit_hashes([i.encode("utf-8", "replace").decode() for i in ids])
    assert ((values >= 0) & (values < 1)).all()


@pytest.mark.parametrize(
    ("size", "train", "held"), [(0, 1, 1), (30_000_000, 1, 1), (10**9, 15, 1), (10**13, 1024, 1024)]
)
def test_buckets_grow_with_the_corpus(size: int, train: int, held: int) -> None:
    planned = Buckets.plan(size, 0.02)
    assert (planned.train, planned.held) == (train, held)
    assert planned.split(train - 1) == "train" and planned.split(train) == "heldout"


def test_unigram_entropy_equals_the_sum_by_hand() -> None:
    train, held = np.array([3, 1, 0, 0]), np.array([1, 0, 1, 0])
    assert unigram_entropy(train, held) == pytest.approx(-(np.log(4 / 8) + np.log(1 / 8)) / 2)
    uniform = np.full(16, 5)
    assert unigram_entropy(uniform, uniform) == pytest.approx(np.log(16))


def test_counts_leave_padding_out() -> None:
    packed = pack(np.array([1, 1, 2], np.uint16), np.array([3]), 2, pad_id=0, keep_tail=True)
    assert token_counts(packed, 4).tolist() == [0, 2, 1, 0]


def test_package_needs_no_torch_or_ray(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, modelyard.tokens.units;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'numba') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
