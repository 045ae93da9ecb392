"""Held-out loss: the same number as training's own evaluation, whatever the batch; spread and units."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelyard.evaluate.loss import Loss, heldout, summarise
from modelyard.models import load_model
from modelyard.tokens import TokenDataset
from modelyard.train.heldout import heldout_loss
from modelyard.train.objective import causal_lm, causal_lm_by_document
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("mask", "objective"), [(False, causal_lm), (True, causal_lm_by_document)])
@pytest.mark.parametrize(("limit", "batch"), [(None, 8), (None, 3), (5, 2), (1, 8)])
def test_equals_the_evaluation_of_training(
    tokens: Path, model_folder: Path, mask: bool, objective: object, limit: int | None, batch: int
) -> None:
    data, model = TokenDataset.open(tokens / "heldout"), load_model(model_folder)
    told: list[int] = []
    loss = heldout(model, data, limit, document_mask=mask, batch=batch, done=told.append)
    reference = heldout_loss(Strategy(model, ALONE), objective, data, limit)  # type: ignore[arg-type]
    assert loss.nats == pytest.approx(reference, abs=1e-6)
    assert sum(told) == loss.sequences == (limit or len(data))


def test_a_model_that_knows_nothing_costs_the_logarithm_of_the_vocabulary(tokens: Path, model_folder: Path) -> None:
    data, model = TokenDataset.open(tokens / "heldout"), load_model(model_folder)
    torch.nn.init.zeros_(model.lm_head.weight)
    loss = heldout(model, data, None)
    assert loss.nats == pytest.approx(math.log(data.vocab_size), abs=1e-6)
    assert loss.perplexity == pytest.approx(data.vocab_size, rel=1e-5)
    assert loss.error == pytest.approx(0, abs=1e-7)
    assert loss.tokens == data.tokens - len(data)
    assert len(loss.by_position) == data.sequence_length - 1


@given(n=st.integers(2, 30), length=st.integers(1, 10), seed=st.integers(0, 1000))
def test_spread_of_equal_sequences_is_the_usual_standard_error(n: int, length: int, seed: int) -> None:
    nats = np.random.default_rng(seed).random((n, length))
    loss = summarise(nats, np.ones((n, length), bool))
    means = nats.mean(axis=1)
    assert loss.nats == pytest.approx(nats.mean())
    assert loss.error == pytest.approx(means.std(ddof=1) / math.sqrt(n))
    assert np.allclose(loss.by_position, nats.mean(axis=0))


def test_nothing_to_predict_is_not_a_number() -> None:
    assert math.isnan(summarise(np.zeros((2, 3)), np.zeros((2, 3), bool)).nats)


def test_bits_per_byte_is_total_nats_over_bytes() -> None:
    loss = Loss(nats=2.0, error=0.0, tokens=90, sequences=10, by_position=())
    assert loss.bits_per_byte(tokens=100, text_bytes=400) == pytest.approx(200 / math.log(2) / 400)
