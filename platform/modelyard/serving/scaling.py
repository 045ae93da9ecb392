"""How many engine replicas the engines' own load asks for: key/value memory in use and tokens that wait.

Serve pickles this module by value into its controller: it must import nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

KV_USED = "kv_used"
WAITING_TOKENS = "waiting_tokens"


def desired_replicas(
    kv_used: Collection[float],
    waiting_tokens: Collection[float],
    *,
    queued: float,
    ongoing: float,
    kv_target: float,
    tokens_target: float,
    sequences: int,
) -> float:
    """Replicas that bring the load to its target.

    Args:
        kv_used: share of slots or cache blocks held by requests, from 0 to 1, for each replica that reported.
        waiting_tokens: prompt tokens not yet computed, for each replica.
        queued: requests no replica has taken yet.
        ongoing: requests anywhere, in replicas or queued.
        kv_target: share of the key/value memory that should be in use.
        tokens_target: waiting tokens that are one more replica's worth.
        sequences: requests a replica computes at once.

    Returns:
        A fraction: whole replicas, delays and bounds are Serve's affair. At least one while anything runs.
    """
    busy = sum(kv_used) / kv_target + sum(waiting_tokens) / tokens_target + queued / sequences
    return max(busy, 1.0 if ongoing > 0 else 0.0)


class EngineLoad:
    """Serve's autoscaling policy over what `EngineReplica.record_autoscaling_stats` reports."""

    def __init__(self, kv_target: float, tokens_target: float, sequences: int) -> None:
        self._kv_target, self._tokens_target, self._sequences = kv_target, tokens_target, sequences

    def __call__(self, ctx: Any) -> tuple[float, dict[str, Any]]:
        """The decision for one deployment, and no state. `ctx` is Serve's `AutoscalingContext`."""
        if ctx.current_num_replicas == 0:
            return ctx.target_num_replicas, {}
        metrics = ctx.aggregated_metrics or {}
        found = desired_replicas(
            list(metrics.get(KV_USED, {}).values()), list(metrics.get(WAITING_TOKENS, {}).values()),
            queued=ctx.total_queued_requests or 0.0, ongoing=ctx.total_num_requests, kv_target=self._kv_target,
            tokens_target=self._tokens_target, sequences=self._sequences,
        )  # fmt: skip
        return found, {}
