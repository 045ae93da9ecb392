"""What one key may use: requests and tokens a minute, as buckets that fill steadily."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from modelyard.serving.errors import ApiError
from modelyard.serving.options import Limits

MOST_HOLDERS = 10_000
"""Holders remembered; beyond it the one unused longest is forgotten, whose buckets are full by then."""


@dataclass
class _Bucket:
    """Fills at `rate` a second up to a minute's worth; what is taken may bring it below zero once."""

    rate: float
    level: float
    seen: float

    def fill(self, now: float) -> None:
        self.level = min(self.level + (now - self.seen) * self.rate, self.rate * 60)
        self.seen = now

    def wait(self, amount: float) -> float:
        """Seconds until `amount`, at most a full bucket, can be taken."""
        return max(min(amount, self.rate * 60) - self.level, 0.0) / self.rate


class Limiter:
    """Counts what each holder of a key uses, in this process.

    Args:
        limits: of everybody, and of holders by name.
        clock: seconds, rising.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits, self._clock = limits, clock
        self._buckets: dict[str, tuple[_Bucket | None, _Bucket | None]] = {}

    def admit(self, holder: str, tokens: int) -> None:
        """Takes one request and `tokens` from a holder's buckets. Raises ApiError 429 with the time to wait."""
        buckets = self._of(holder)
        waits = [b.wait(amount) for b, amount in zip(buckets, (1, tokens), strict=True) if b is not None]
        if waits and max(waits) > 0:
            what = "requests" if buckets[0] is not None and buckets[0].wait(1) > 0 else "tokens"
            raise ApiError(
                429, f"more {what} a minute than this key may use", kind="rate_limit_error",
                code="rate_limit_exceeded", retry_after=max(1, math.ceil(max(waits))),
            )  # fmt: skip
        self._take(buckets, 1, tokens)

    def priority(self, holder: str, wanted: int) -> int:
        """The priority a holder's request gets. Raises ApiError 403 when it asks for a more urgent one than it may.

        A key below the usual 0 lowers requests that name no priority: 0 is then not theirs.
        """
        least = self._limits.of(holder).priority
        if wanted < least and wanted != 0:
            message = f"this key's requests may have a priority of {least} or more, not {wanted}"
            raise ApiError(403, message, kind="permission_error", param="priority", code="priority_not_allowed")
        return max(wanted, least)

    def counts(self, holder: str) -> bool:
        """Whether a holder's tokens are limited: if not, nobody needs to tell of them."""
        return self._limits.of(holder).tokens_per_minute is not None

    def used(self, holder: str, tokens: int) -> None:
        """Takes tokens that were generated; the holder's next request waits for them."""
        self._take(self._of(holder), 0, tokens)

    def _take(self, buckets: tuple[_Bucket | None, _Bucket | None], requests: int, tokens: int) -> None:
        for bucket, amount in zip(buckets, (requests, tokens), strict=True):
            if bucket is not None:
                bucket.level -= amount

    def _of(self, holder: str) -> tuple[_Bucket | None, _Bucket | None]:
        now = self._clock()
        found = self._buckets.pop(holder, None)
        if found is None:
            limit = self._limits.of(holder)
            found = _bucket(limit.requests_per_minute, now), _bucket(limit.tokens_per_minute, now)
            if len(self._buckets) >= MOST_HOLDERS:
                del self._buckets[next(iter(self._buckets))]
        self._buckets[holder] = found  # last: the first of the dict is the one unused longest
        for bucket in found:
            if bucket is not None:
                bucket.fill(now)
        return found


def _bucket(a_minute: float | None, now: float) -> _Bucket | None:
    return None if a_minute is None else _Bucket(a_minute / 60, a_minute, now)
