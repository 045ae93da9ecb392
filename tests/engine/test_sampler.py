"""Sampling: distributions against a slow reference, penalties, and independence of batch mates."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.engine import Request, Sampling, sampler
from modelyard.engine.sampler import sample
from modelyard.engine.scheduler import Sequence
from modelyard.errors import DataError

VOCABULARY = 400


def sequence(
    sampling: Sampling, prompt: tuple[int, ...] = (1, 2), output: tuple[int, ...] = (), seed: int = 0
) -> Sequence:
    made = Sequence(Request("r", prompt, sampling), 0, 0.0, [*prompt, *output], seed, 10)
    for token in output:
        made.output_counts[token] = made.output_counts.get(token, 0) + 1
    return made


def logits(rows: int = 1, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * spread


def allowed(row: torch.Tensor, p: Sampling) -> set[int]:
    """Tokens a slow reading of the definitions keeps."""
    probabilities = (row.double() / p.temperature).softmax(-1)
    order = sorted(range(VOCABULARY), key=lambda i: -float(probabilities[i]))
    if p.top_k:
        order = order[: p.top_k]
    whole = sum(float(probabilities[i]) for i in order)
    kept, mass = [], 0.0
    for i in order:
        if mass >= p.top_p * whole and kept:
            break
        kept.append(i)
        mass += float(probabilities[i])
    floor = p.min_p * float(probabilities[order[0]])
    return {i for i in kept if float(probabilities[i]) >= floor * (1 - 1e-9)} | {order[0]}


parameters = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5.0),
    top_k=st.sampled_from([0, 1, 3, 50, 300, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
)


@settings(max_examples=80, deadline=None)
@given(p=parameters, seed=st.integers(0, 2**63 - 1))
def test_draws_only_what_the_filters_allow(p: Sampling, seed: int) -> None:
    row = logits(seed=seed % 97)
    token = sample(row.clone(), [sequence(p, seed=seed)])[0].token
    # One place of tolerance: float32 cumulative sums may end the nucleus a token later.
    wider = replace(p, top_p=min(1.0, p.top_p + 1e-5), min_p=max(0.0, p.min_p - 1e-6))
    assert token in allowed(row[0], wider)


@settings(max_examples=40, deadline=None)
@given(st.lists(parameters, min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_row_does_not_depend_on_its_mates(batch: list[Sampling], seed: int) -> None:
    rows = logits(len(batch), seed=seed % 89)
    together = sample(rows.clone(), [sequence(p, seed=seed + i) for i, p in enumerate(batch)])
    for i, p in enumerate(batch):
        alone = sample(rows[i : i + 1].clone(), [sequence(p, seed=seed + i)])
        assert alone[0].token == together[i].token


def test_frequencies_follow_the_distribution() -> None:
    row = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.125]]))
    counts = [0] * 4
    for seed in range(4000):
        counts[sample(row.clone(), [sequence(Sampling(), seed=seed)])[0].token] += 1
    for count, p in zip(counts, (0.5, 0.25, 0.125, 0.125), strict=True):
        assert abs(count / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_a_shortlist_that_is_too_short_falls_back_to_the_whole_vocabulary() -> None:
    flat = torch.zeros(1, VOCABULARY)
    seen = {sample(flat.clone(), [sequence(Sampling(top_p=0.99), seed=s)])[0].token for s in range(800)}
    assert len(seen) > sampler.SHORTLIST


def test_greedy_takes_the_largest_and_top_k_one_is_greedy() -> None:
    rows = logits(2)
    chosen = sample(rows.clone(), [sequence(Sampling(temperature=0.0)), sequence(Sampling(top_k=1))])
    assert [c.token for c in chosen] == rows.argmax(-1).tolist()


def test_penalties_change_logits_as_defined() -> None:
    row = torch.zeros(1, VOCABULARY)
    row[0, 1], row[0, 2], row[0, 3] = 2.0, -1.0, 4.0
    p = Sampling(
        temperature=0.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25, logit_bias={9: 1.5}
    )
    sample(row, [sequence(p, prompt=(1, 2), output=(3, 3))])
    assert row[0, 1] == 1.0
    assert row[0, 2] == -2.0
    assert row[0, 3] == pytest.approx(4.0 / 2 - 0.5 - 2 * 0.25)
    assert row[0, 9] == 1.5


def test_logprobs_are_of_the_model_before_temperature_and_penalties() -> None:
    row = logits()
    expected = row[0].log_softmax(-1)
    p = Sampling(temperature=0.5, repetition_penalty=1.5, logprobs=3)
    choice = sample(row.clone(), [sequence(p)])[0]
    assert choice.logprob is not None
    assert choice.logprob.logprob == pytest.approx(float(expected[choice.token]))
    assert [t for t, _ in choice.logprob.top] == expected.topk(3).indices.tolist()


def test_rows_that_are_not_finite_are_named_and_spoil_no_other() -> None:
    rows = logits(3)
    rows[1, 5] = torch.nan
    chosen = sample(rows.clone(), [sequence(Sampling(), seed=i) for i in range(3)])
    assert chosen[1].token == -1
    assert chosen[0].token >= 0
    assert chosen[2].token >= 0


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0.0},
        {"logit_bias": {VOCABULARY: 1.0}},
        {"stop": tuple("ab" * 20)},
        {"stop": ("",)},
        {"logprobs": 21},
    ],
)
def test_bad_parameters_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(DataError) as caught:
        Sampling(**bad).check(VOCABULARY)  # type: ignore[arg-type]
    assert caught.value.place == next(iter(bad))
    assert "must be" in caught.value.mend
