"""Keys and values on a CPU: contiguous working slots, and the block store that prefixes are kept in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from modelyard.engine.checkpoint import DecoderConfig


class BlockStore(Protocol):
    """Where a backend keeps blocks that other requests may begin with."""

    def load(self, slot: int, blocks: Sequence[int]) -> None:
        """Brings stored blocks to the front of a slot, in order."""
        ...

    def save(self, slot: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Stores blocks of a slot: (index in the slot, stored block)."""
        ...


class NoStore:
    """For backends without a prefix cache."""

    def load(self, slot: int, blocks: Sequence[int]) -> None:
        """Nothing is ever stored."""

    def save(self, slot: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Stores nothing."""


class Cache:
    """Working slots [layers, 2, slots, kv_heads, length, head_dim] and a block store, float32 or bfloat16.

    Attention reads a sequence's keys and values in one contiguous run, which a CPU does several times as fast
    as through a block table; the price is that a full block is copied to the store once, and from it when another
    request begins with it. Copying 512 tokens costs a hundredth of computing them. Both are zero-filled lazily by
    the operating system, so memory is used only as sequences grow.

    Args:
        config: the decoder's shape.
        slots: sequences computed at once.
        length: tokens a slot holds.
        blocks: blocks of the store, 0 = no prefix cache.
        size: tokens of a block.
        kept: type of the numbers.

    Attributes:
        data: the slots as a tensor.
        slots: the same as an array, bfloat16 as uint16.
    """

    def __init__(
        self,
        config: DecoderConfig,
        slots: int,
        length: int,
        blocks: int = 0,
        size: int = 16,
        kept: torch.dtype = torch.float32,
    ) -> None:
        length = -(-length // size) * size
        self.size = size
        kind = np.uint16 if kept == torch.bfloat16 else np.float32
        # NumPy's zeros are pages the operating system has yet to give; torch.zeros writes them all.
        self.slots = np.zeros((config.layers, 2, slots, config.kv_heads, length, config.head_dim), kind)
        self.data = torch.from_numpy(self.slots).view(kept)
        self._blocks = np.zeros((blocks, config.layers, 2, config.kv_heads, size, config.head_dim), kind)

    def load(self, slot: int, blocks: Sequence[int]) -> None:
        """Copies stored blocks to the front of a slot, in order."""
        for index, block in enumerate(blocks):
            self.slots[:, :, slot, :, index * self.size : (index + 1) * self.size] = self._blocks[block]

    def save(self, slot: int, blocks: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of a slot to the store: (index in the slot, stored block)."""
        for index, block in blocks:
            self._blocks[block] = self.slots[:, :, slot, :, index * self.size : (index + 1) * self.size]

    def move(self, source: int, target: int, tokens: int) -> None:
        """Copies the first `tokens` positions of a slot to another slot."""
        self.slots[:, :, target, :, :tokens] = self.slots[:, :, source, :, :tokens]


EMPTY = np.empty((0, 0), np.float32)
"""Stands for "none" where a kernel takes an optional matrix."""
