"""Attention of our own on a CPU is SDPA's: values and gradients, for every shape and run of positions it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

from modelyard.lanes import WIDE
from modelyard.train.cpu_attention import NAME, attend, causal_attention, starts_of, use_kernels

pytestmark = pytest.mark.skipif(not WIDE, reason="needs AVX-512")
CPU = torch.device("cpu")


def tensors(
    seed: int, b: int, heads: int, shared: int, length: int, width: int, *, behind: bool
) -> tuple[torch.Tensor, ...]:
    """Query, key, value and a gradient; `behind`: heads lie behind positions in memory, as projections leave them."""
    chance = torch.Generator().manual_seed(seed)

    def one(n: int) -> torch.Tensor:
        if behind:
            return torch.randn(b, length, n, width, generator=chance).transpose(1, 2)
        return torch.randn(b, n, length, width, generator=chance)

    made = one(heads), one(shared), one(shared)
    return (*(t.requires_grad_() for t in made), one(heads))


def runs(seed: int, b: int, length: int, share: float) -> torch.Tensor:
    """Starts of documents [B, L] that begin at random."""
    begins = torch.rand(b, length, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(begins, torch.arange(length), 0).cummax(1).values.int()


def mask_of(starts: torch.Tensor) -> torch.Tensor:
    place = torch.arange(starts.shape[1])
    return ((place >= starts[..., None]) & (place <= place[:, None]))[:, None]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    b=st.integers(1, 3),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    length=st.integers(2, 150),
    width=st.sampled_from([16, 32, 64, 80, 128]),
    packed=st.booleans(),
    behind=st.booleans(),
)
def test_values_and_gradients_are_those_of_sdpa(
    seed: int, b: int, heads: tuple[int, int], length: int, width: int, packed: bool, behind: bool
) -> None:
    query, key, value, slope = tensors(seed, b, *heads, length, width, behind=behind)
    starts = runs(seed, b, length, 0.1) if packed else None
    exact = [t.detach().double().requires_grad_() for t in (query, key, value)]
    wanted = F.scaled_dot_product_attention(
        *exact,
        attn_mask=None if starts is None else mask_of(starts),
        is_causal=starts is None,
        enable_gqa=True,
        scale=0.3,
    )
    found, sizes = causal_attention(query, key, value, starts, 0.3)
    assert (found - wanted).abs().max() < 2e-5
    assert sizes.shape == query.shape[:3]
    pairs = zip(
        torch.autograd.grad(found, (query, key, value), slope),
        torch.autograd.grad(wanted, exact, slope.double()),
        strict=True,
    )
    for one, other in pairs:
        assert (one - other).abs().max() < 1e-5 * max(1.0, float(other.abs().max()))


def test_threads_share_the_work() -> None:
    query, key, value, slope = tensors(0, 2, 4, 2, 70, 32, behind=True)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found = causal_attention(query, key, value, None, 0.2)[0]
            results.append((found, *torch.autograd.grad(found, (query, key, value), slope)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_not_finite_stays_visible() -> None:
    query, key, value, _ = (t.detach() for t in tensors(0, 1, 1, 1, 40, 16, behind=False))
    value[0, 0, 10] = float("nan")
    found = causal_attention(query, key, value, None, 0.25)[0]
    assert found[0, 0, 10:].isnan().all()
    query[0, 0, 20] = float("nan")
    assert causal_attention(query, key, key, None, 0.25)[0][0, 0, 20].isnan().all()


def test_the_operator_keeps_torchs_rules() -> None:
    query, key, value, _ = tensors(0, 2, 2, 1, 20, 16, behind=True)
    for starts in (None, runs(0, 2, 20, 0.2)):
        torch.library.opcheck(causal_attention, (query, key, value, starts, 0.25))


def test_masks_that_are_runs_are_known() -> None:
    starts = runs(1, 2, 50, 0.1)
    query = torch.zeros(2, 1, 50, 16)
    mask = mask_of(starts)
    for _ in range(2):  # the second time from the mask itself
        assert torch.equal(starts_of(mask, query), starts)  # type: ignore[arg-type]
    assert starts_of(mask[:1], query).shape == (2, 50)  # type: ignore[union-attr]
    for other in (mask.float(), mask_of(starts[:, :40]), torch.ones_like(mask)):
        assert starts_of(other, query) is None
    holed = mask.clone()
    holed[0, 0, 49, int(starts[0, 49])] = False
    holed[0, 0, 49, 48] = False
    holed[0, 0, 49, 0] = True
    assert starts_of(holed, query) is None


@pytest.mark.parametrize("case", ["mask with holes", "whole", "dropout", "half"])
def test_what_it_is_not_made_for_goes_to_sdpa(case: str) -> None:
    query, key, value, _ = (t.detach() for t in tensors(0, 1, 2, 2, 24, 16, behind=False))
    mask, causal, dropout = None, True, 0.0
    if case == "mask with holes":
        mask = torch.rand(1, 1, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.5
        mask |= torch.eye(24, dtype=torch.bool)
    elif case == "whole":
        causal = False
    elif case == "dropout":
        dropout = 0.5
    else:
        query, key, value = (t.bfloat16() for t in (query, key, value))
    module: Any = torch.nn.Module()
    module.is_causal = causal
    torch.manual_seed(0)
    found = attend(module, query, key, value, mask, dropout)[0]
    torch.manual_seed(0)
    wanted = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal and mask is None)
    assert torch.equal(found, wanted.transpose(1, 2))


@pytest.mark.parametrize("how", ["whole", "packed", "window", "padded"])
def test_a_model_computes_the_same(how: str) -> None:
    config = LlamaConfig(
        vocab_size=60, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    if how == "window":
        from transformers import MistralConfig

        config = MistralConfig(**{**config.to_dict(), "model_type": "mistral", "sliding_window": 9})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    ids = torch.randint(0, 60, (2, 40))
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if how == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(15), torch.arange(25)]).expand(2, 40)
    if how == "padded":
        inputs["attention_mask"] = torch.ones(2, 40, dtype=torch.long)
        inputs["attention_mask"][1, 30:] = 0
    results = []
    for kernels in (False, True):
        if kernels:
            assert use_kernels(model, CPU)
            assert model.config._attn_implementation == NAME
        model.zero_grad()
        logits = model(**inputs).logits
        seen = logits[:, :30]
        seen.square().mean().backward()
        results.append([seen.detach(), *(p.grad.clone() for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=2e-6, rtol=1e-4)
    assert not use_kernels(model, torch.device("meta"))
    grown = model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    assert torch.equal(grown, model.generate(ids[:, :5], max_new_tokens=4, do_sample=False, pad_token_id=0))
