"""The reading order: a permutation each epoch, pure in (seed, step), blind to the number of workers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.tokens import global_batch_indices, permute, rank_slice


@given(n=st.integers(1, 5000), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**40))
@settings(deadline=None)
def test_permute_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed, epoch)), np.arange(n))


@given(n=st.integers(2**33, 2**61), seed=st.integers(0, 2**64 - 1))
@settings(deadline=None, max_examples=30)
def test_permute_large_ranges_need_no_memory(n: int, seed: int) -> None:
    positions = np.concatenate([np.arange(100), n - 1 - np.arange(100)])
    values = permute(positions, n, seed)
    assert len(np.unique(values)) == 200
    assert values.min() >= 0 and values.max() < n


def test_permute_any_position_alone_equals_the_whole() -> None:
    whole = permute(np.arange(1000), 1000, seed=3, epoch=2)
    assert [int(permute(p, 1000, seed=3, epoch=2)) for p in (0, 17, 999)] == whole[[0, 17, 999]].tolist()


def test_permute_spreads_every_item_over_every_position() -> None:
    n, epochs = 16, 2000
    seen = np.zeros((n, n))
    for epoch in range(epochs):
        seen[np.arange(n), permute(np.arange(n), n, seed=1, epoch=epoch)] += 1
    expected = epochs / n
    chi_square = ((seen - expected) ** 2 / expected).sum()
    # 225 degrees of freedom: mean 225, standard deviation 21; five of them is a fair alarm.
    assert chi_square < 225 + 5 * 21.3


def test_permute_seeds_and_epochs_differ() -> None:
    orders = {tuple(permute(np.arange(100), 100, s, e)) for s in range(5) for e in range(5)}
    assert len(orders) == 25


@given(
    seed=st.integers(0, 2**32),
    batch=st.integers(1, 64),
    n=st.integers(1, 300),
    first=st.integers(0, 50),
)
@settings(deadline=None, max_examples=30)
def test_each_epoch_reads_every_sequence_once(seed: int, batch: int, n: int, first: int) -> None:
    steps = first + -(-2 * n // batch) + 1
    stream = np.concatenate([global_batch_indices(seed, s, batch, n) for s in range(steps)])
    for epoch in range(len(stream) // n):
        assert np.array_equal(np.sort(stream[epoch * n : (epoch + 1) * n]), np.arange(n))


@given(step=st.integers(0, 10**6), batch=st.integers(1, 100), world=st.integers(1, 17), n=st.integers(1, 10**9))
@settings(deadline=None)
def test_any_number_of_workers_reads_the_same_batch(step: int, batch: int, world: int, n: int) -> None:
    whole = global_batch_indices(7, step, batch, n)
    parts = [rank_slice(global_batch_indices(7, step, batch, n), rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_batch_larger_than_the_data_spans_epochs() -> None:
    batch = global_batch_indices(0, 5, 10, 3)
    assert len(batch) == 10
    assert set(batch.tolist()) == {0, 1, 2}


def test_known_order_never_changes() -> None:
    """A changed order would break every resume across versions of the code."""
    assert global_batch_indices(42, 3, 8, 1000).tolist() == KNOWN


KNOWN = [348, 288, 409, 556, 34, 278, 200, 153]


@pytest.mark.parametrize(("step", "batch", "n"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_arguments_are_refused(step: int, batch: int, n: int) -> None:
    with pytest.raises(ValueError, match="want step"):
        global_batch_indices(0, step, batch, n)


def test_positions_and_ranks_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.4"):
        permute([5], 5, 0)
    with pytest.raises(ValueError, match="rank 2"):
        rank_slice(np.arange(4), 2, 2)
