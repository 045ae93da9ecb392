"""Key/value blocks: who holds which, which content can be found again, and what is thrown out first.

A block holds the keys and values of `size` consecutive tokens. Blocks are counted by reference, so requests
with the same beginning hold the same ones; a block that nobody holds but whose content is known stays until
its room is needed, the least recently used first. Pure bookkeeping: backends keep the tensors.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def chain(tokens: Sequence[int], size: int, salt: bytes, known: list[bytes]) -> list[bytes]:
    """Digests of the full blocks of `tokens`, each over its parent's digest and its own tokens.

    A digest names a block's content together with all before it. 128 bits of BLAKE2b: tenants share the
    cache, so nobody must be able to make two prompts collide.

    Args:
        tokens: token ids.
        size: tokens in a block.
        salt: what else decides keys and values (the adapter).
        known: digests of the first blocks, found earlier; extended in place and returned.
    """
    for index in range(len(known), len(tokens) // size):
        parent = known[-1] if known else salt
        own = array("q", tokens[index * size : (index + 1) * size]).tobytes()
        known.append(hashlib.blake2b(parent + own, digest_size=16).digest())
    return known


class Blocks:
    """A pool of `count` blocks of `size` tokens."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._digests: list[bytes | None] = [None] * count
        self._found: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be allocated, at the price of forgetting idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks somebody holds."""
        return self.count - self.available

    @property
    def idle(self) -> int:
        """Blocks nobody holds whose content can be found again."""
        return len(self._idle)

    def needed(self, tokens: int) -> int:
        """Blocks that `tokens` tokens fill, the last one perhaps in part."""
        return -(-tokens // self.size)

    def allocate(self) -> int:
        """Takes a block of unknown content. Raises IndexError when none is available."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block = self._idle.popitem(last=False)[0]
            self._forget(block)
        else:
            raise IndexError("no block is available")
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """Adds a holder to a block that `find` returned."""
        if self._holders[block] == 0:
            del self._idle[block]
        self._holders[block] += 1

    def release(self, block: int) -> None:
        """Takes a holder away. Raises KeyError when there is none."""
        if self._holders[block] == 0:
            raise KeyError(f"block {block} is held by nobody")
        self._holders[block] -= 1
        if self._holders[block] == 0:
            if self._digests[block] is None:
                self._free.append(block)
            else:
                self._idle[block] = None

    def publish(self, block: int, digest: bytes) -> bool:
        """Makes a held block's content findable. False when the same content already is, in another block."""
        if digest in self._found:
            return False
        self._digests[block] = digest
        self._found[digest] = block
        return True

    def find(self, digest: bytes) -> int | None:
        """The block with this content, or None."""
        return self._found.get(digest)

    def forget(self) -> None:
        """Makes no content findable any more (the weights have changed)."""
        for block in list(self._found.values()):
            self._forget(block)
        self._free += self._idle
        self._idle.clear()

    def _forget(self, block: int) -> None:
        digest = self._digests[block]
        if digest is not None:
            del self._found[digest]
            self._digests[block] = None

    def invariants(self, tables: Sequence[Sequence[int]]) -> list[str]:
        """What is wrong, given the block table of every holder; an empty list when nothing is."""
        held = [0] * self.count
        for table in tables:
            for block in table:
                held[block] += 1
        faults = [
            f"block {b} is held {held[b]} times, counted {n}" for b, n in enumerate(self._holders) if n != held[b]
        ]
        free, idle = set(self._free), set(self._idle)
        if len(free) != len(self._free) or free & idle:
            faults.append("a block is free twice")
        loose = {b for b, n in enumerate(self._holders) if n == 0}
        if loose != free | idle:
            faults.append(f"blocks {sorted(loose ^ (free | idle))} are lost or held while free")
        if any(self._digests[b] is None for b in idle) or any(self._digests[b] is not None for b in free):
            faults.append("an idle block has no content, or a free one has")
        if {d: b for b, d in enumerate(self._digests) if d is not None} != self._found:
            faults.append("the index of contents does not match the blocks")
        return faults
