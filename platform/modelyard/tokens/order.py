"""The order sequences are read in: a pure function of (seed, step), so the state of a reader is one integer.

Let n be the number of sequences and B the global batch. Batch `step` covers the positions
p = step*B .. step*B + B-1 of one endless stream; position p lies in epoch e = p div n at offset
o = p mod n, and holds sequence pi_{seed,e}(o), where pi_{seed,e} permutes 0..n-1.

pi is a balanced Feistel network on 2h bits, 4^h >= n: a word is split into halves (l, r), and a
round maps (l, r) to (r, l xor F(r, key)); whatever F is, that can be undone, so the network
permutes 0..4^h-1. Where the result is >= n the network is applied again ("cycle walking", Black
and Rogaway, Ciphers with Arbitrary Finite Domains, 2002): the walk follows a cycle of the large
permutation, which contains the start (< n), so it ends, and restricted to 0..n-1 it is a
permutation again. As 4^h < 4n the expected number of applications is below 4. Nothing is stored:
any position of any epoch costs O(1) time and memory, with no shuffle of n indices at start or
resume. The order does not know how many workers read it; each takes a slice of the batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

_ROUNDS = 6
"""Luby and Rackoff need 4 rounds for strong pseudo-randomness; 6 give a margin on small halves."""
_MIN_HALF_BITS = 2
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _mix(word: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea, Flood 2014) on one Python integer."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _MASK
    return word ^ (word >> 31)


def _mix_words(words: _Words) -> _Words:
    """The same as :func:`_mix` on an array; unsigned overflow wraps, as wanted."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _keys(seed: int, epoch: int) -> list[np.uint64]:
    state = _mix((seed + _GOLDEN) & _MASK) ^ _mix((epoch + 2 * _GOLDEN) & _MASK)
    return [np.uint64(_mix((state + (r + 1) * _GOLDEN) & _MASK)) for r in range(_ROUNDS)]


def _feistel(words: _Words, half: int, keys: list[np.uint64]) -> _Words:
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = words >> shift, words & mask
    for key in keys:
        left, right = right, left ^ (_mix_words(right ^ key) & mask)
    return (left << shift) | right


def permute(positions: npt.ArrayLike, n: int, seed: int, epoch: int = 0) -> Indices:
    """The pseudo-random permutation of 0..n-1 for (seed, epoch), at any positions.

    Args:
        positions: integers in 0..n-1, any shape.
        n: size of the permuted range, 1 <= n < 2**62.
        seed: any integer; equal modulo 2**64 means equal.
        epoch: which of the seed's permutations.

    Returns:
        int64, the shape of `positions`: `permute(arange(n), n, ...)` holds each of 0..n-1 once.

    Raises:
        ValueError: n or a position is out of range.
    """
    where = np.asarray(positions, dtype=np.int64)
    if not 1 <= n < 1 << 62:
        raise ValueError(f"n is {n}, want 1 <= n < 2**62")
    if where.size and (where.min() < 0 or where.max() >= n):
        raise ValueError(f"positions must lie in 0..{n - 1}")
    half = max(_MIN_HALF_BITS, ((n - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    words = _feistel(where.astype(np.uint64).reshape(-1), half, keys)
    while (outside := np.flatnonzero(words >= np.uint64(n))).size:
        words[outside] = _feistel(words[outside], half, keys)
    return words.astype(np.int64).reshape(where.shape)


def global_batch_indices(seed: int, step: int, global_batch: int, n_sequences: int) -> Indices:
    """Which sequences the optimizer step `step` (0-based) reads, over all workers together.

    Within an epoch every sequence comes exactly once; a batch may straddle two epochs.

    Returns:
        int64 [global_batch], a pure function of the arguments.

    Raises:
        ValueError: a negative step, or a global batch or number of sequences below one.
    """
    if step < 0 or global_batch < 1 or n_sequences < 1:
        raise ValueError(
            f"want step >= 0, global_batch >= 1, n_sequences >= 1; got {step}, {global_batch}, {n_sequences}"
        )
    return stream_indices(seed, step * global_batch, global_batch, n_sequences)


def stream_indices(seed: int, start: int, count: int, n_sequences: int) -> Indices:
    """The sequences at positions `start` .. `start + count - 1` of the endless stream, int64 [count].

    Raises:
        ValueError: a negative start or count, or no sequences.
    """
    if start < 0 or count < 0 or n_sequences < 1:
        raise ValueError(f"want start >= 0, count >= 0, n_sequences >= 1; got {start}, {count}, {n_sequences}")
    # Python integers: a start may pass 2**63 on a long enough run, offsets may not.
    offsets = np.arange(count, dtype=np.int64) + start % n_sequences
    epochs = offsets // n_sequences
    result = np.empty(count, dtype=np.int64)
    for local in range(int(epochs[-1]) + 1 if count else 0):
        chosen = epochs == local
        epoch = start // n_sequences + local
        result[chosen] = permute(offsets[chosen] - local * n_sequences, n_sequences, seed, epoch)
    return result


def rank_slice(indices: Indices, rank: int, world: int) -> Indices:
    """The contiguous part of a global batch that worker `rank` of `world` reads.

    The slices of all ranks, in order, are the batch; their sizes differ by at most one.

    Raises:
        ValueError: rank outside 0..world-1.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} outside 0..{world - 1}")
    n = len(indices)
    return indices[n * rank // world : n * (rank + 1) // world]
