"""Four ways to serve a traffic profile, their cost a day, and where one overtakes another.

Real-time keeps replicas for the busiest hour on. Serverless pays only busy seconds at a premium and
starts cold. Asynchronous serving queues requests and follows the load hour by hour. Batch runs all of a
day's requests at once on spot capacity at the throughput of the largest batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.errors import RecipeError
from modelyard.planner.cost import price, spot_overhead
from modelyard.planner.hardware import Hardware, find_hardware
from modelyard.planner.inference import UTILISATION, Rates, largest_batch

SERVERLESS_PREMIUM = 2.5
"""Price of a serverless second over an on-demand second of the same device (2 to 4 at the large clouds, 2025)."""
COLD_START_SECONDS = 60.0


@dataclass(frozen=True)
class Mode:
    """One mode's cost a day and what a person waits for an answer."""

    name: str
    usd_per_day: float
    device_hours: float
    latency: str
    usd_per_million_tokens: float


@dataclass(frozen=True)
class Comparison:
    """The modes, cheapest first, and the loads (requests a day) at which two of them cost the same."""

    modes: tuple[Mode, ...]
    break_even: Mapping[str, float | None]

    @property
    def cheapest(self) -> Mode:
        """The first of `modes`."""
        return self.modes[0]


def compare_modes(
    config: Mapping[str, Any], *, hardware: str | Hardware, hourly_requests: Sequence[float], prompt: int, answer: int,
    dtype: str = "bf16", tensor: int = 1, time_per_token: float = 0.05, premium: float = SERVERLESS_PREMIUM,
    minimum_replicas: int = 1,
) -> Comparison:  # fmt: skip
    """Compares real-time, serverless, asynchronous and batch serving of one day's traffic.

    Args:
        config: Hugging Face config.
        hardware: device of the table with a price.
        hourly_requests: requests in each hour of a day (24 numbers, zeros allowed).
        prompt: mean prompt tokens.
        answer: mean generated tokens.
        dtype: of the weights.
        tensor: devices a replica.
        time_per_token: target of the interactive modes, seconds.
        premium: price of a serverless second over an on-demand one.
        minimum_replicas: real-time replicas that are always on.

    Raises:
        RecipeError: not 24 hours, negative or all-zero traffic, or hardware without a price.
    """
    if len(hourly_requests) != 24 or any(r < 0 for r in hourly_requests) or not sum(hourly_requests) > 0:
        raise RecipeError(
            f"a traffic profile of {len(hourly_requests)} hours and {sum(hourly_requests):g} requests",
            place="hourly_requests", mend="give 24 numbers of requests, none negative, not all zero",
        )  # fmt: skip
    hw = find_hardware(hardware)
    demand, spot = price(hw), price(hw, spot=True)
    if demand is None or spot is None:
        raise RecipeError(f"{hw.name} has no price", place="prices", mend="add it to the price table")
    fast = largest_batch(
        config, hw, prompt=prompt, answer=answer, dtype=dtype, tensor=tensor, time_per_token=time_per_token
    )
    full = largest_batch(config, hw, prompt=prompt, answer=answer, dtype=dtype, tensor=tensor)
    single = _Prices(demand * tensor, spot * tensor * spot_overhead(tensor, hw.node), premium, minimum_replicas)
    usd = {name: f(hourly_requests, fast, full, single) for name, f in _MODES.items()}
    tokens = sum(hourly_requests) * (prompt + answer)
    modes = [
        Mode(name, money, hours * tensor, _LATENCY[name], money / tokens * 1e6) for name, (money, hours) in usd.items()
    ]
    points = {
        f"{a} / {b}": break_even(a, b, hourly_requests, fast, full, single)
        for a, b in (("serverless", "real-time"), ("asynchronous", "real-time"), ("batch", "serverless"))
    }
    return Comparison(tuple(sorted(modes, key=lambda mode: mode.usd_per_day)), points)


@dataclass(frozen=True)
class _Prices:
    demand: float
    spot: float
    premium: float
    minimum: int


def _replicas(requests: float, fast: Rates) -> int:
    return math.ceil(requests / 3600 / (fast.requests_per_second * UTILISATION))


def _real_time(hours: Sequence[float], fast: Rates, full: Rates, p: _Prices) -> tuple[float, float]:
    replicas = max(_replicas(max(hours), fast), p.minimum)
    return replicas * 24 * p.demand, replicas * 24.0


def _serverless(hours: Sequence[float], fast: Rates, full: Rates, p: _Prices) -> tuple[float, float]:
    # Sparse requests do not share a batch: a busy second serves as many as arrive during one request.
    total = 0.0
    alone = fast.time_to_first_token + fast.time_per_token * (1 / fast.requests_per_second / fast.time_per_token)
    for requests in hours:
        together = min(max(requests / 3600 * alone, 1.0), float(fast.batch))
        busy = requests / (fast.requests_per_second * max(together / fast.batch, 1 / fast.batch))
        starts = min(requests, 4.0) * COLD_START_SECONDS if requests / 3600 * alone < 1 else 0.0
        total += min(busy, requests * alone) + starts
    return total / 3600 * p.demand * p.premium, total / 3600


def _asynchronous(hours: Sequence[float], fast: Rates, full: Rates, p: _Prices) -> tuple[float, float]:
    # A queue evens out each hour, so replicas run full; they go to zero when it is empty.
    needed = sum(requests / 3600 / full.requests_per_second for requests in hours)
    starts = sum(1 for requests in hours if requests) * COLD_START_SECONDS / 3600 * 0.25
    return (needed + starts) * p.demand, needed + starts


def _batch(hours: Sequence[float], fast: Rates, full: Rates, p: _Prices) -> tuple[float, float]:
    needed = sum(hours) / 3600 / full.requests_per_second + COLD_START_SECONDS / 3600
    return needed * p.spot, needed


_MODES = {"real-time": _real_time, "serverless": _serverless, "asynchronous": _asynchronous, "batch": _batch}
_LATENCY = {
    "real-time": "at once", "serverless": "at once, after a cold start of about a minute when idle",
    "asynchronous": "minutes", "batch": "within a day",
}  # fmt: skip


def break_even(
    first: str, second: str, hours: Sequence[float], fast: Rates, full: Rates, prices: _Prices
) -> float | None:
    """Requests a day, the profile's form kept, at which two modes cost the same; None if one is always cheaper."""
    day = sum(hours)

    def difference(scale: float) -> float:
        scaled = [hour * scale for hour in hours]
        return _MODES[first](scaled, fast, full, prices)[0] - _MODES[second](scaled, fast, full, prices)[0]

    low, high = 1 / day, 1e9 / day
    if difference(low) * difference(high) > 0:
        return None
    for _ in range(100):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if difference(middle) * difference(low) > 0 else (low, middle)
    return low * day
