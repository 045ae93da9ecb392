"""Merging of tensors against definitions written out, and of folders against what must not be merged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from modelyard.errors import DataError
from modelyard.models.merging import linear, merge_folders, slerp, ties


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_linear_merge_is_the_weighted_mean() -> None:
    a, b, c = (draw(i, 3, 4) for i in range(3))
    assert torch.allclose(linear([a, b, c], [1.0, 2.0, 1.0]), (a + 2 * b + c) / 4, atol=1e-6)


def test_slerp_walks_the_arc_at_even_speed() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for share in (0.0, 0.25, 0.5, 1.0):
        found = slerp([one, other], [1 - share, share])
        angle = share * math.pi / 2
        assert found.tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    assert torch.allclose(slerp([one, 3 * one], [1.0, 1.0]), 2 * one), "parallel: a straight line"
    assert torch.equal(slerp([torch.zeros(2), torch.zeros(2)], [1.0, 1.0]), torch.zeros(2))
    length = slerp([draw(1, 50), draw(2, 50)], [1.0, 1.0]).norm()
    assert length > linear([draw(1, 50), draw(2, 50)], [1.0, 1.0]).norm() * 1.2, "a mean would be shorter"


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 2.0, 1.0]])
def test_ties_equals_the_paper_entry_by_entry(weights: list[float]) -> None:
    base, models = draw(9, 4, 5), [draw(i, 4, 5) for i in range(3)]
    changes = [(m.double() - base.double()).flatten().tolist() for m in models]
    kept = []
    for change in changes:
        least = sorted(map(abs, change), reverse=True)[round(0.4 * len(change)) - 1]
        kept.append([c if abs(c) >= least else 0.0 for c in change])
    wanted = []
    for place, start in enumerate(base.flatten().tolist()):
        entries = [(k[place], w) for k, w in zip(kept, weights, strict=True)]
        total = sum(c * w for c, w in entries)
        agreed = [(c, w) for c, w in entries if c * total > 0]
        wanted.append(start + 0.7 * (sum(c * w for c, w in agreed) / sum(w for _, w in agreed) if agreed else 0.0))
    assert ties(base, models, weights, 0.4, 0.7).flatten().tolist() == pytest.approx(wanted, abs=1e-6)


def folder(path: Path, vocabulary: dict[str, int] | None = None, **tensors: torch.Tensor) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if vocabulary:
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return path


def test_folders_must_be_alike(tmp_path: Path) -> None:
    words = {"a": 0, "b": 1}
    first = folder(tmp_path / "first", words, w=draw(1, 2, 2), v=draw(2, 3))
    good = folder(tmp_path / "good", words, w=draw(3, 2, 2).half(), v=draw(4, 3))
    merged = merge_folders([first, good], None, lambda _, parts: linear(parts, [1.0, 1.0]))
    assert set(merged) == {"w", "v"}
    assert torch.allclose(merged["v"], (draw(2, 3) + draw(4, 3)) / 2)
    for name, tensors, vocabulary, complaint in (
        ("missing", {"w": draw(1, 2, 2)}, words, "differ in 1 tensors, the first v"),
        ("shape", {"w": draw(1, 2, 3), "v": draw(1, 3)}, words, "w has the shapes"),
        ("words", {"w": draw(1, 2, 2), "v": draw(1, 3)}, {"a": 1, "b": 0}, "different tokenizers"),
    ):
        with pytest.raises(DataError, match=complaint):
            merge_folders([first, folder(tmp_path / name, vocabulary, **tensors)], None, lambda _, parts: parts[0])
