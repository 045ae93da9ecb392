"""Semantic deduplication: clusters, decisions against all pairs, and a real (tiny) model on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from modelyard.corpus import dedup, semantic
from modelyard.corpus.dedup_options import SemanticOptions
from modelyard.errors import DataError


@pytest.fixture
def model(embedding_model: str) -> str:
    return embedding_model


def options(model: str, **changes: Any) -> SemanticOptions:
    return SemanticOptions.model_validate({"method": "semantic", "model": model, **changes})


def vectors(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    """n directions, each with two near copies."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(n, 16))
    every = np.concatenate([base, base + rng.normal(scale=0.05, size=base.shape), base])
    return (every / np.linalg.norm(every, axis=1, keepdims=True)).astype(np.float32)


def key_table(rows: np.ndarray[Any, Any]) -> pa.Table:
    flat = pa.array(rows.astype(np.float16).reshape(-1))
    return pa.table({
        "doc": dedup.address(0, len(rows)), "rank": np.zeros(len(rows)), "id": [f"id{n}" for n in range(len(rows))],
        "vector": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
    })  # fmt: skip


@pytest.mark.parametrize("clusters", [1, 5])
def test_decisions_are_those_of_all_pairs_within_clusters(model: str, clusters: int) -> None:
    table = key_table(vectors(700))
    found = semantic.decide(table, options(model, clusters=clusters, cosine=0.9)).to_pylist()
    rows = semantic.vectors_of(table)
    gone = {row["doc"]: (int(row["twin"][2:]), row["jaccard"]) for row in found}
    for doc, (twin, cosine) in gone.items():
        assert twin not in gone and cosine >= 0.9 and cosine == pytest.approx(float(rows[doc] @ rows[twin]), abs=1e-4)
    kept = [doc for doc in range(len(rows)) if doc not in gone]
    if clusters == 1:
        close = rows[kept] @ rows[kept].T - np.eye(len(kept))
        assert close.max() < 0.9001 and kept == list(range(700))
    else:
        assert len(kept) < 750


def test_clusters_do_not_depend_on_the_batch() -> None:
    rows = vectors(300)
    centroids = semantic.centres(rows, 12, 10, seed=1)
    assert centroids.shape == (12, 16)
    whole = semantic.nearest(rows, centroids)
    parts = [semantic.nearest(rows[i : i + 7], centroids) for i in range(0, len(rows), 7)]
    assert np.array_equal(whole, np.concatenate(parts)) and len(set(whole.tolist())) > 6


def test_a_model_on_disk_embeds_and_its_files_enter_the_options(model: str, tmp_path: Path) -> None:
    own = options(model)
    texts = ["w1 w2 w3 w4", "w4 w3 w2 w1", "w50 w60 w70 w80 w90", "", "w1 w2 w3 w4"]
    table = pa.table({"id": [str(n) for n in range(5)], "text": texts})
    rows = semantic.vectors_of(semantic.keys(table, dedup.address(0, 5), own))
    # A text without tokens is like nothing, not even like another one.
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.array([1, 1, 1, 0, 1]), abs=1e-3)
    assert rows[0] @ rows[4] > 0.999 and rows[0] @ rows[1] > rows[0] @ rows[2]
    assert own.checksum and options(model, checksum=own.checksum) == own
    with pytest.raises(ValidationError, match="recipe says"):
        options(model, checksum="0")
    with pytest.raises(ValidationError, match="holds no model"):
        options(str(tmp_path))
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match="cannot be opened"):
        semantic.Embedder(str(tmp_path), 16)
