"""Which replica holds the beginning of a prompt, or its adapter: a request goes there unless its queue is longer.

`Affinity` is the memory, plain and without Ray. `AffinityRouter` is Serve's own request router with it: Serve finds
replicas, keeps their queue lengths and retries; this only says whom to prefer.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from modelyard.engine.request import Request

HOLDERS = 4
"""Replicas remembered for one beginning, the latest first."""

LONGEST = 64
"""Blocks of a prompt that are looked at: what follows changes no choice worth its hashing."""


class Affinity:
    """Remembers who computed which beginnings.

    A prompt is cut into blocks of `block` tokens; each block's key is chained to those before it and to the adapter,
    so that equal keys mean equal beginnings under the same adapter. Memory is bounded: `remembered` keys, the least
    recently used go first (about 200 bytes each).
    """

    def __init__(self, block: int, remembered: int) -> None:
        self._block, self._remembered = block, remembered
        self._holders: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def keys(self, request: Request) -> list[int]:
        """Keys of the adapter, if there is one, and of every whole block, shortest beginning first."""
        key = hash(request.adapter)
        keys = [key] if request.adapter is not None else []
        prompt = request.prompt[: self._block * LONGEST]
        for start in range(0, len(prompt) - self._block + 1, self._block):
            key = hash((key, prompt[start : start + self._block]))
            keys.append(key)
        return keys

    def holders(self, keys: Sequence[int], alive: Collection[str]) -> tuple[str, ...]:
        """Living replicas of the longest known beginning; empty when nobody knows any of it."""
        for key in reversed(keys):
            found = tuple(name for name in self._holders.get(key, ()) if name in alive)
            if found:
                return found
        return ()

    def remember(self, keys: Sequence[int], name: str) -> None:
        """`name` computes these beginnings now."""
        for key in keys:
            others = (n for n in self._holders.pop(key, ()) if n != name)
            self._holders[key] = (name, *others)[:HOLDERS]
        while len(self._holders) > self._remembered:
            self._holders.popitem(last=False)


class AffinityRouter(RequestRouter):
    """Prefers replicas that hold the prompt's beginning or the adapter; else the shorter of two queues.

    Options of `RequestRouterConfig.request_router_kwargs`: `block` tokens a key covers; `imbalance`, the requests by
    which a preferred replica's queue may exceed the shortest before it is passed over; `remembered` keys; `prefer`, 0
    to prefer nobody.
    """

    def initialize_state(self, **options: int) -> None:
        """Serve's hook, called once with the options."""
        self._affinity = Affinity(options.get("block", 32), options.get("remembered", 50_000))
        self._imbalance, self._prefer = options.get("imbalance", 4), bool(options.get("prefer", True))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Serve's hook: ranks of replicas; the shortest queue of a rank is taken, a full rank is passed over."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # wait a little when every queue is full
        if not candidate_replicas:
            return []
        anyone = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        request = _engine_request(pending_request)
        if request is None or len(candidate_replicas) == 1 or not self._prefer:
            return [anyone]
        alive = {r.replica_id.unique_id: r for r in candidate_replicas}
        held = self._affinity.holders(self._affinity.keys(request), alive)
        preferred = [alive[name] for name in held]
        if not preferred or self._shortest(preferred) - self._shortest(candidate_replicas) > self._imbalance:
            return [anyone]
        return [preferred, anyone]

    def _get_next_pending_request_to_route(self) -> PendingRequest | None:
        """Of the requests that wait while every replica is full the most urgent goes first; Serve takes the oldest."""
        waiting = self._pending_requests_to_route
        urgent = most_urgent([None if p.future.done() else _priority(p) for p in waiting])
        if urgent is None:
            waiting.clear()
            return None
        pending: PendingRequest = waiting[urgent]
        del waiting[urgent]
        return pending

    def _shortest(self, replicas: list[RunningReplica]) -> int:
        return min(self.replica_queue_len_cache.get(r.replica_id) or 0 for r in replicas)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Serve's hook: the replica took the request."""
        request = _engine_request(pending_request)
        if request is not None and self._prefer:
            self._affinity.remember(self._affinity.keys(request), replica_id.unique_id)


def most_urgent(priorities: Sequence[int | None]) -> int | None:
    """Where the first of the smallest numbers stands; None when there is no number."""
    found = [(priority, at) for at, priority in enumerate(priorities) if priority is not None]
    return min(found)[1] if found else None


def _priority(pending: PendingRequest) -> int:
    request = _engine_request(pending)
    return 0 if request is None else request.priority


def _engine_request(pending: PendingRequest | None) -> Request | None:
    """The engine request a call carries, None for other calls (statistics, checks)."""
    if pending is None or not pending.args or not isinstance(pending.args[0], Request):
        return None
    return pending.args[0]
