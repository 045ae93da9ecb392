"""A scheduled step laid out flat: which tokens, at which positions of which slots, and which results are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modelyard.engine.adapters import Adapter
from modelyard.engine.scheduler import Piece

SHORT, NEAR = 12, 128
"""Pieces up to SHORT tokens, or that see at most NEAR positions, attend row by row, from the nearest caches; others as
one masked product, which reads keys once."""


@dataclass(frozen=True)
class Chunk:
    """Rows `first .. first+count` of a step: `count` tokens of one slot from position `start`."""

    first: int
    count: int
    slot: int
    start: int


@dataclass(slots=True)
class Span:
    """Rows `first .. last-1` of the wanted results belong to this piece."""

    piece: Piece
    first: int
    last: int


@dataclass(frozen=True)
class StepBatch:
    """One step of T tokens, short pieces first.

    `tokens` int64 [T]; `positions`, `slots` int64 arrays [T]; `wanted` rows whose results are wanted, None when all
    are. `short` rows attend row by row, the others by `chunks`. `adapters` and their rows (None = all), over all
    rows and over the wanted ones. `pieces` in the order of their rows.
    """

    tokens: Tensor
    positions: np.ndarray
    slots: np.ndarray
    wanted: Tensor | None
    spans: tuple[Span, ...]
    short: int
    chunks: tuple[Chunk, ...]
    adapters: tuple[tuple[Adapter, Tensor | None], ...] = ()
    adapters_wanted: tuple[tuple[Adapter, Tensor | None], ...] = ()
    pieces: tuple[Piece, ...] = ()


def lay_out(pieces: list[Piece]) -> StepBatch:
    """The flat form of a step."""
    if all(p.count == 1 and p.last and not p.sequence.measured for p in pieces):
        return _singles(pieces)
    ordered = sorted(pieces, key=lambda p: not _short(p))
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    wanted: list[int] = []
    chunks: list[Chunk] = []
    spans: list[Span] = []
    owners: list[Adapter | None] = []
    short = 0
    for piece in ordered:
        first, count = len(tokens), piece.count
        tokens += piece.tokens
        positions += range(piece.start, piece.start + count)
        slots += [piece.sequence.slot] * count
        owners += [piece.sequence.adapter] * count
        if _short(piece):
            short += count
        else:
            chunks.append(Chunk(first, count, piece.sequence.slot, piece.start))
        rows = _wanted(piece)
        if rows:
            spans.append(Span(piece, len(wanted), len(wanted) + rows))
            wanted += range(first + count - rows, first + count)
    every = len(wanted) == len(tokens)
    return StepBatch(
        tokens=torch.tensor(tokens),
        positions=np.array(positions, dtype=np.int64),
        slots=np.array(slots, dtype=np.int64),
        wanted=None if every else torch.tensor(wanted, dtype=torch.int64),
        spans=tuple(spans),
        short=short,
        chunks=tuple(chunks),
        adapters=_groups(owners),
        adapters_wanted=_groups([owners[i] for i in wanted]),
        pieces=tuple(ordered),
    )


def _short(piece: Piece) -> bool:
    return piece.count <= SHORT or piece.start + piece.count <= NEAR


def _singles(pieces: list[Piece]) -> StepBatch:
    """The usual step: one token of every sequence, and every result is wanted."""
    starts = [p.start for p in pieces]
    adapters = _groups([p.sequence.adapter for p in pieces])
    return StepBatch(
        tokens=torch.tensor([p.sequence.tokens[p.start] for p in pieces]),
        positions=np.array(starts, dtype=np.int64),
        slots=np.array([p.sequence.slot for p in pieces], dtype=np.int64),
        wanted=None,
        spans=tuple(Span(p, i, i + 1) for i, p in enumerate(pieces)),
        short=len(pieces),
        chunks=(),
        adapters=adapters,
        adapters_wanted=adapters,
        pieces=tuple(pieces),
    )


def _wanted(piece: Piece) -> int:
    """How many of the piece's last rows somebody needs."""
    if not piece.sequence.measured:
        return 1 + piece.guessed if piece.last else 0
    request = piece.sequence.request
    if request.task == "embed" and request.pooling == "mean":
        return piece.count
    if request.prompt_logprobs is not None and piece.start < piece.sequence.prompt_length:
        return min(piece.count, max(piece.start + piece.count - (request.logprobs_from - 1), int(piece.last)))
    return 1 + piece.guessed if piece.last else 0


def _groups(owners: list[Adapter | None]) -> tuple[tuple[Adapter, Tensor | None], ...]:
    """Rows by adapter, so that each adapter is applied once a product."""
    if not any(owners):
        return ()
    rows: dict[int, list[int]] = {}
    by_id: dict[int, Adapter] = {}
    for row, adapter in enumerate(owners):
        if adapter is not None:
            by_id[id(adapter)] = adapter
            rows.setdefault(id(adapter), []).append(row)
    return tuple(
        (by_id[key], None if len(found) == len(owners) else torch.tensor(found)) for key, found in rows.items()
    )
