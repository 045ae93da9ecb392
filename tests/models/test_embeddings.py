"""Embeddings of an extended vocabulary: new rows are the mean, old tokens keep their logits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from modelyard.models.embeddings import extend_embeddings


@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_are_the_mean_and_old_logits_stay(tied: bool) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    assert extend_embeddings(model, 53) == 3 and model.config.vocab_size == 53
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert torch.allclose(part.weight[50:], part.weight[:50].mean(0).expand(3, -1))
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    after = model(ids).logits
    assert torch.equal(after[..., :50], before)
    assert torch.allclose(after[..., 50:], before.mean(-1, keepdim=True).expand(-1, -1, 3), atol=1e-5)
    assert extend_embeddings(model, 40) == 0 and model.get_input_embeddings().weight.shape[0] == 53


def test_new_tokens_in_padded_rows_begin_as_the_mean_too() -> None:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                         num_attention_heads=2))  # fmt: skip
    assert extend_embeddings(model, 53, first=50) == 3
    weight = model.get_output_embeddings().weight
    assert weight.shape[0] == 64
    assert torch.allclose(weight[50:53], weight[:50].mean(0).expand(3, -1))
    assert not torch.allclose(weight[53], weight[50])
