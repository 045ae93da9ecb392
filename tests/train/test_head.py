"""The fused output layer and loss: the plain loss and gradients, on every kind of head, and the plain way elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_parts import TINY

from modelyard.models import build_config, build_on_meta, initialise
from modelyard.models.build import materialise
from modelyard.models.options import ModelOptions
from modelyard.train import head
from modelyard.train.head import IGNORE, language_loss, linear_cross_entropy, summed_cross_entropy


def parts(n: int, hidden: int, vocabulary: int, learnt: float) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(n)
    labels = torch.randint(0, vocabulary, (n,), generator=random)
    labels[torch.rand(n, generator=random) > learnt] = IGNORE
    rows, weight = torch.randn(n, hidden, generator=random), torch.randn(vocabulary, hidden, generator=random)
    return rows, weight, torch.randn(vocabulary, generator=random), labels


def gradients(loss: Any, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    leaves = [t.clone().requires_grad_() for t in tensors]
    value = loss(*leaves)
    (value * 0.5).backward()
    return value.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("learnt", [1.0, 0.3, 0.0])
def test_loss_and_gradients_are_the_plain_ones(learnt: float, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 50 * 7)  # seven rows a chunk
    if compiled:
        monkeypatch.setattr(head, "_compiled_softmax", lambda: head._likelihoods)
    rows, weight, bias, labels = parts(40, 16, 50, learnt)
    plain = gradients(lambda h, w, b: F.cross_entropy(h @ w.T + b, labels, reduction="sum"), (rows, weight, bias))
    ours = gradients(lambda h, w, b: linear_cross_entropy(h, w, labels, b, compiled=compiled), (rows, weight, bias))
    for a, b in zip(plain, ours, strict=True):
        scale = max(1.0, float(a.abs().max()))
        assert float((a - b).abs().max()) <= 1e-6 * scale


def test_a_frozen_matrix_gets_no_gradient_and_no_gradients_are_made_without_grad() -> None:
    rows, weight, _, labels = parts(20, 8, 30, 1.0)
    rows.requires_grad_()
    linear_cross_entropy(rows, weight, labels).backward()
    assert rows.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(rows, weight, labels).requires_grad


def test_autocast_computes_in_its_type_and_sums_in_fp32() -> None:
    rows, weight, _, labels = parts(20, 8, 30, 1.0)
    expected = float(F.cross_entropy(rows @ weight.T, labels, reduction="sum"))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(rows, weight, labels)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(expected, rel=0.02)
    assert float(loss) != expected


CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "capped": {"model_type": "gemma3_text", "final_logit_softcapping": 5.0, "head_dim": 8},
    "scaled": {"model_type": "granite", "logits_scaling": 3.0},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_is_trained_by_the_loss_of_its_own_logits(kind: str) -> None:
    model = build_on_meta(build_config(ModelOptions(config={**(TINY.config or {}), **CONFIGS[kind]}), 300))
    materialise(model, torch.device("cpu"))
    initialise(model, 0)
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    labels = F.pad(ids[:, 1:], (0, 1), value=IGNORE)
    expected, weight = summed_cross_entropy(model(**inputs).logits, labels)
    expected.backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss, metrics = language_loss(model, inputs, labels)
    loss.backward()
    assert metrics["weight"] == weight["weight"] == 57
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-5)
    assert (model in head._plain_heads) == (kind in ("capped", "scaled"))
    assert model(input_ids=ids).logits.shape == (3, 20, 300), "the output layer is as it was"
