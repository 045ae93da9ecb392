"""Key/value slots: which row of the cache belongs to which sequence."""

from __future__ import annotations

import heapq


class Slots:
    """Hands out the lowest free slot, so that occupied slots stay at the front of the cache.

    A decode step attends over rows `0 .. height-1` as one view without copying; holes in that range
    are wasted work, and :meth:`move` closes them.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))
        self._used: set[int] = set()

    @property
    def used(self) -> int:
        return len(self._used)

    @property
    def height(self) -> int:
        """One more than the highest occupied slot."""
        return max(self._used, default=-1) + 1

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

    def hole(self) -> tuple[int, int] | None:
        """(highest occupied slot, lowest free slot below it), or None when the front is dense."""
        top = self.height - 1
        return (top, self._free[0]) if self._free and self._free[0] < top else None

    def occupied(self) -> frozenset[int]:
        """All occupied slots."""
        return frozenset(self._used)
