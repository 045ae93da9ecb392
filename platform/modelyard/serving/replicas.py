"""Engine replicas of Ray Serve, and how the ingress asks them.

A replica sends one message a step a request. One that dies before a request's first token costs nothing but time:
the ingress asks another.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from modelyard.engine.request import EngineStats, Request, StepOutput
from modelyard.serving import scaling
from modelyard.serving.errors import overloaded, unavailable
from modelyard.serving.folders import local_folder
from modelyard.serving.shelf import Shelf

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Replicas asked in turn until one sends a first token."""


class EngineReplica:
    """One native engine behind a deployment handle."""

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        adapters: Mapping[str, str] | None = None,
        most: int = 8,
        *,
        warm: bool = True,
    ) -> None:
        from modelyard.engine.native import NativeEngine
        from modelyard.engine.options import EngineOptions
        from modelyard.serving.warm import warm_up

        chosen = EngineOptions.model_validate(options)
        self._engine = NativeEngine(local_folder(model, weights=True), chosen)
        if warm:
            log.warning("warmed up in %.1f s", warm_up(self._engine, chosen))
        self._shelf = Shelf(self._engine, adapters or {}, most, lambda place: local_folder(place, weights=True))

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Outputs of one request; what piled up since the last message comes as one."""
        async with self._shelf.lent(request.adapter), aclosing(self._engine.submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def stats(self) -> EngineStats:
        """The engine's statistics."""
        return self._engine.stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the autoscaling policy sees of this replica."""
        stats = self._engine.stats()
        slots = stats.running / max(1, stats.slots)
        blocks = stats.blocks_used / max(1, stats.blocks)
        return {scaling.KV_USED: max(slots, blocks), scaling.WAITING_TOKENS: float(stats.waiting_tokens)}

    async def invariants(self) -> list[str]:
        """What is wrong with the engine's bookkeeping; empty when nothing is."""
        return self._engine.invariants()

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine thread has ended")


class ServeBackend:
    """Engine replicas behind a deployment handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle.options(method_name="stream", stream=True)
        self._all = handle

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `Backend.stream`. Before the first token another replica takes over from one that died."""
        for attempt in range(ATTEMPTS):
            started = over = False
            responses: Any = self._handle.remote(request)
            try:
                async for output in responses:
                    started = True
                    yield output
                over = True
                return
            except BackPressureError:
                over = True
                raise overloaded() from None
            except (RayActorError, DeploymentUnavailableError) as error:
                over = True
                log.warning("replica lost at attempt %d, answer begun: %s", attempt + 1, started)
                if started or attempt + 1 == ATTEMPTS:
                    raise unavailable("the replica was lost; try again") from error
            finally:
                if not over:  # cancelling a call that failed raises its error once more
                    responses.cancel()

    async def stats(self) -> list[EngineStats]:
        """See `Backend.stats`."""
        with suppress(DeploymentUnavailableError):
            return list(await self._all.broadcast("stats").results_async(timeout_s=5))
        return []
