"""The two Ray Serve deployments: engine replicas that compute, and the ingress that speaks HTTP.

The ingress tokenizes and checks, so that what reaches a replica's queue can run; a replica sends one message a
step a request. A replica that dies before a request's first token costs nothing but time: the ingress asks another.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from modelyard.engine.checkpoint import check_adapter, check_folder, read_config
from modelyard.engine.request import EngineStats, Request, StepOutput
from modelyard.engine.tokenizer import Tokenizer
from modelyard.serving.api import build_app
from modelyard.serving.cache import MemoryCache, RedisCache
from modelyard.serving.errors import overloaded, unavailable
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.limits import Limiter
from modelyard.serving.metrics import Metrics
from modelyard.serving.options import ServeOptions
from modelyard.serving.service import Service
from modelyard.serving.shelf import Shelf
from modelyard.storage import filesystem, is_remote, join, list_files

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Replicas asked in turn until one sends a first token."""


def local_folder(model: str, *, weights: bool) -> Path:
    """The model's folder on this node; a remote one is copied once to the cache (`~/.cache/modelyard/served`).

    The cache is keyed by the URI and the sizes of its files and may be deleted at any time.
    """
    if not is_remote(model):
        return Path(model.removeprefix("file://"))
    files = [(name, size) for name, size in list_files(model) if weights or not name.endswith(".safetensors")]
    key = hashlib.sha256(repr((model, files)).encode()).hexdigest()[:24]
    target = Path.home() / ".cache" / "modelyard" / "served" / key
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent))
    for name, _ in files:
        fs, path = filesystem(join(model, name))
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(part / name))
    try:
        part.rename(target)
    except OSError:  # another replica of this node was faster
        shutil.rmtree(part)
    return target


class EngineReplica:
    """One native engine behind a deployment handle."""

    def __init__(
        self, model: str, options: Mapping[str, Any], adapters: Mapping[str, str] | None = None, most: int = 8
    ) -> None:
        from modelyard.engine.native import NativeEngine
        from modelyard.engine.options import EngineOptions

        self._engine = NativeEngine(local_folder(model, weights=True), EngineOptions.model_validate(options))
        self._shelf = Shelf(self._engine, adapters or {}, most, lambda place: local_folder(place, weights=True))

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Outputs of one request; what piled up since the last message comes as one."""
        async with self._shelf.lent(request.adapter), aclosing(self._engine.submit(request)) as outputs:
            async for output in outputs:
                yield output

    async def stats(self) -> EngineStats:
        """The engine's statistics."""
        return self._engine.stats()

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


class Ingress:
    """HTTP in front of the replicas."""

    def __init__(
        self,
        replicas: DeploymentHandle[Any],
        model: str,
        name: str,
        options: Mapping[str, Any],
        keys: Mapping[str, str] | None,
        version: str = "",
    ) -> None:
        o = ServeOptions.model_validate(options)
        folder = local_folder(model, weights=False)
        self._keys, self._max_body = keys, o.max_body
        self._feedback = FeedbackStore(o.feedback) if o.feedback else None
        c = o.cache
        self._service = Service(
            name,
            Tokenizer(folder),
            ServeBackend(replicas),
            max_length=read_config(folder).length(o.engine.max_length),
            max_choices=o.max_choices,
            timeout=o.request_timeout_s,
            metrics=Metrics(),
            cache=None
            if c is None
            else RedisCache(c.redis_url, c.ttl_s)
            if c.redis_url
            else MemoryCache(c.max_bytes, c.ttl_s),
            share=c is not None and c.share,
            limiter=Limiter(o.limits),
            version=version,
            adapters=tuple(o.adapters),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self._service, keys=self._keys, max_body=self._max_body, feedback=self._feedback)


def build(
    model: str, name: str, options: ServeOptions, keys: Mapping[str, str] | None, version: str = ""
) -> serve.Application:
    """The Serve application of one model.

    Args:
        model: URI or path of the model folder, readable from every node.
        name: the model's name in the API.
        options: replicas, limits, engine.
        keys: digests of API keys and their holders, or None.
        version: of the model, as answers name it.

    Raises:
        DataError: the folder cannot be served.
    """
    check_folder(local_folder(model, weights=False))
    for place in options.adapters.values():
        check_adapter(local_folder(place, weights=False))
    a = options.autoscaling
    # The engine queues what exceeds its slots, so that a freed slot is filled in the next step, not a round trip later.
    ongoing = options.engine.max_sequences * 2
    resources: dict[str, Any] = {"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica}
    replicas = serve.deployment(EngineReplica).options(  # type: ignore[attr-defined]
        name="engine",
        max_ongoing_requests=ongoing,
        max_queued_requests=options.max_queued,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": a.min_replicas,
            "max_replicas": a.max_replicas,
            "target_ongoing_requests": a.target_requests or max(1.0, 0.75 * options.engine.max_sequences),
            "upscale_delay_s": a.upscale_delay_s,
            "downscale_delay_s": a.downscale_delay_s,
        },
    )
    ingress = serve.deployment(serve.ingress()(Ingress)).options(  # type: ignore[attr-defined]
        name="ingress",
        max_ongoing_requests=ongoing * a.max_replicas + options.max_queued + 64,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": 0},
    )
    engine = replicas.bind(model, options.engine.model_dump(), options.adapters, options.max_adapters)
    bound: serve.Application = ingress.bind(
        engine, model, name, options.model_dump(), dict(keys) if keys else None, version
    )
    return bound
