"""Objectives: packing does not leak, masks choose what is learnt, padding does not count, user mistakes are named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from training_parts import TINY

from modelyard.errors import RecipeError
from modelyard.models import AdapterOptions, ModelOptions, add_adapter, build_config, build_on_meta, initialise
from modelyard.models.build import materialise
from modelyard.models.packing import check_documents_apart
from modelyard.train.objective import (
    IGNORE,
    causal_lm,
    causal_lm_by_document,
    checked,
    completion_lm,
    next_tokens,
    positions,
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    built = build_on_meta(build_config(TINY, 300))
    materialise(built, torch.device("cpu"))
    initialise(built, 0)
    return built


def reference(model: Any, ids: torch.Tensor, start: int = 1) -> float:
    """Sum of cross-entropy of tokens `start`.. of one document, the plain way."""
    logits = model(input_ids=ids[None]).logits[0]
    return float(F.cross_entropy(logits[start - 1 : -1], ids[start:], reduction="sum").detach())


def test_causal_loss_is_the_plain_one(model: Any) -> None:
    ids = torch.randint(0, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    loss, metrics = causal_lm(model, {"input_ids": ids, "document_ids": torch.zeros(3, 20, dtype=torch.int32)})
    assert metrics["weight"] == 3 * 19
    assert float(loss.detach()) == pytest.approx(sum(reference(model, row) for row in ids), rel=1e-5)


def test_padding_is_not_counted(model: Any) -> None:
    ids = torch.randint(0, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(1, 20, dtype=torch.int32)
    documents[:, 12:] = -1
    loss, metrics = causal_lm(model, {"input_ids": ids, "document_ids": documents})
    assert metrics["weight"] == 11
    assert float(loss.detach()) == pytest.approx(reference(model, ids[0, :12]), rel=1e-5)


def test_packed_documents_do_not_see_each_other(model: Any) -> None:
    ids = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    documents = torch.zeros(2, 24, dtype=torch.int32)
    documents[0, 10:], documents[1, 5:], documents[1, 15:] = 1, 1, -1
    parts = [ids[0, :10], ids[0, 10:], ids[1, :5], ids[1, 5:15]]
    loss, metrics = causal_lm_by_document(model, {"input_ids": ids, "document_ids": documents})
    assert metrics["weight"] == sum(len(part) - 1 for part in parts)
    assert float(loss.detach()) == pytest.approx(sum(reference(model, part) for part in parts), rel=1e-5)


def test_only_the_completion_is_learnt(model: Any) -> None:
    ids = torch.randint(0, 300, (1, 24), generator=torch.Generator().manual_seed(2))
    documents = torch.zeros(1, 24, dtype=torch.int32)
    documents[0, 10:], documents[0, 20:] = 1, -1
    mask = torch.zeros(1, 24, dtype=torch.bool)
    mask[0, 6:10], mask[0, 17:20] = True, True
    loss, metrics = completion_lm(model, {"input_ids": ids, "document_ids": documents, "loss_mask": mask})
    assert metrics["weight"] == 7
    expected = reference(model, ids[0, :10], 6) + reference(model, ids[0, 10:20], 7)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    "sizes",
    [
        {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
        {"model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
        {"model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
        {
            "model_type": "opt",
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
        {
            "model_type": "gpt_oss",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "num_local_experts": 4,
        },
    ],
    ids=["bloom", "mpt", "falcon", "falcon-alibi", "opt", "gpt-oss"],
)
def test_architectures_deaf_to_packing_lose_what_transformers_does(sizes: dict[str, Any], adapted: bool) -> None:
    """With ALiBi in the place of positions: whole rows, and packed documents, which these would let see each other."""
    built: Any = build_on_meta(build_config(ModelOptions(config=sizes), 300))
    materialise(built, torch.device("cpu"))
    initialise(built, 0)
    with torch.no_grad():  # larger than at initialisation: attention matters
        for parameter in built.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    check_documents_apart(built)
    built = add_adapter(built, AdapterOptions(), 0) if adapted else built
    built.eval()
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    documents = torch.zeros(2, 20, dtype=torch.int32)
    loss, metrics = causal_lm(built, {"input_ids": ids, "document_ids": documents})
    assert (loss / metrics["weight"]).item() == pytest.approx(built(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    documents[0, 9:], documents[1, 3:], documents[1, 17:] = 1, 1, -1
    parts = [ids[0, :9], ids[0, 9:], ids[1, :3], ids[1, 3:17]]
    loss, _ = causal_lm_by_document(built, {"input_ids": ids, "document_ids": documents})
    wanted = sum(built(input_ids=p[None], labels=p[None]).loss.item() * (len(p) - 1) for p in parts)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)


def test_a_state_that_passes_from_document_to_document_is_refused(model: Any) -> None:
    check_documents_apart(model)
    mamba: Any = build_on_meta(build_config(ModelOptions(config={
        "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}), 300))  # fmt: skip
    materialise(mamba, torch.device("cpu"))
    initialise(mamba, 0)
    with pytest.raises(RecipeError, match="see each other in models of kind mamba"):
        check_documents_apart(mamba)


def test_a_batch_without_targets_has_zero_loss_and_gradient(model: Any) -> None:
    ids = torch.zeros(1, 8, dtype=torch.int64)
    loss, metrics = causal_lm(model, {"input_ids": ids, "document_ids": torch.full((1, 8), -1)})
    loss.backward()
    assert (float(loss.detach()), int(metrics["weight"])) == (0.0, 0)
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)
    model.zero_grad()


def test_labels_and_positions() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    assert next_tokens(ids, torch.tensor([[True, True, False, True]])).tolist() == [[6, IGNORE, 8, IGNORE]]
    assert positions(torch.tensor([[0, 0, 1, 1, 1, -1]])).tolist() == [[0, 1, 0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("result", "complaint"),
    [
        (torch.zeros(()), "returned Tensor"),
        ((torch.zeros(3), {"weight": torch.ones(())}), "not a scalar"),
        ((torch.zeros(()), {}), "no weight"),
    ],
)
def test_an_objective_that_returns_the_wrong_thing_is_named(result: Any, complaint: str) -> None:
    def mine(model: Any, batch: Any) -> Any:
        return result

    with pytest.raises(RecipeError, match=f"objective mine {complaint}|mine returned .*{complaint}"):
        checked(mine)(torch.nn.Identity(), {})
