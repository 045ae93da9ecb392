"""Mixtures: exact shares at every step, weights that move, every sequence once an epoch of its source."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.errors import DataError
from modelyard.tokens.mixture import MixtureOrder

SOURCES = {"web": range(48), "code": range(48, 60), "books": range(60, 97)}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=6).filter(any),
    later=st.lists(st.floats(0, 10), min_size=6, max_size=6).filter(lambda w: w[0] > 0),
    batch=st.integers(1, 40),
)
def test_no_source_is_ahead_or_far_behind_its_share(weights: list[float], later: list[float], batch: int) -> None:
    names = [str(k) for k in range(len(weights))]
    milestones = [(0, dict(zip(names, weights, strict=True))), (20, dict(zip(names, later, strict=False)))]
    order = MixtureOrder(dict.fromkeys(names, range(9)), milestones, 1, lambda step: batch)
    owed, given_so_far = np.zeros(len(names)), np.zeros(len(names))
    for step in range(40):
        owed += batch * order.weights(step) / 2**32
        counts = order.counts(step)
        assert sum(counts) == batch
        given_so_far += counts
        assert (given_so_far - owed < 1 + 1e-6).all()
        assert (owed - given_so_far < max(1, len(names) - 1) + 1e-6).all()


def test_an_order_is_a_function_of_seed_and_step_and_visits_a_source_evenly() -> None:
    def make() -> MixtureOrder:
        return MixtureOrder(SOURCES, [(0, {"web": 2.0, "code": 1.0, "books": 1.0})], 3, lambda step: 8)

    order, again = make(), make()
    batches = [order.indices(step) for step in range(50)]
    for step in (49, 0, 17, 18):
        assert again.indices(step).tolist() == batches[step].tolist()
    seen = np.concatenate(batches)
    assert np.bincount(np.searchsorted([48, 60], seen, side="right")).tolist() == [200, 100, 100]
    web = seen[seen < 48]
    assert all(sorted(web[i : i + 48]) == list(range(48)) for i in range(0, 192, 48)), "once an epoch"
    assert len({tuple(np.searchsorted([48, 60], b, side="right")) for b in batches}) > 10, "sources are shuffled"


def test_weights_move_along_a_line() -> None:
    order = MixtureOrder(SOURCES, [(10, {"web": 1.0}), (20, {"code": 1.0})], 0, lambda step: 10)
    assert [order.counts(step)[1] for step in (0, 10, 15, 20, 90)] == [0, 0, 5, 10, 10]
    assert order.counts(15) == [5, 5, 0]


@pytest.mark.parametrize(
    ("weights", "complaint"),
    [
        ({"wbe": 1.0}, "there is no source 'wbe'"),
        ({"web": -1.0}, "at least 0"),
        ({"web": 0.0}, "not all 0"),
        ({"web": 1.0, "none": 1.0}, "holds no sequences"),
    ],
)
def test_wrong_weights_are_named(weights: dict[str, float], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        MixtureOrder({**SOURCES, "none": range(0)}, [(0, weights)], 0, lambda step: 8)
