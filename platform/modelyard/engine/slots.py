"""Key/value slots: which row of the working cache belongs to which sequence."""

from __future__ import annotations

import heapq


class Slots:
    """Hands out the lowest free slot, so that memory the operating system has given is used again first."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._used: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._used)

    def can_allocate(self) -> bool:
        return bool(self._free)

    def allocate(self) -> int:
        """Takes the lowest free slot. Raises IndexError when there is none."""
        slot = heapq.heappop(self._free)
        self._used.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives a slot back. Raises KeyError when it was not taken."""
        self._used.remove(slot)
        heapq.heappush(self._free, slot)

    def occupied(self) -> frozenset[int]:
        """All occupied slots."""
        return frozenset(self._used)
