"""The Ray Serve deployments: engine replicas that compute, a set for each version, and the ingress that speaks HTTP.

The ingress tokenizes and checks, so that what reaches a replica's queue can run; a replica sends one message a
step a request. A replica that dies before a request's first token costs nothing but time: the ingress asks another.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import TaskProcessorConfig
from ray.serve.task_consumer import task_consumer, task_handler

from modelyard.engine.checkpoint import check_adapter, check_folder, read_config
from modelyard.engine.request import EngineStats, Request, StepOutput
from modelyard.engine.tokenizer import Tokenizer
from modelyard.monitor.metrics import SHADOW
from modelyard.serving import scaling
from modelyard.serving.api import build_app
from modelyard.serving.background import Background, perform
from modelyard.serving.cache import Cache, MemoryCache, RedisCache
from modelyard.serving.consumer import RedisTasks, store_of
from modelyard.serving.errors import overloaded, unavailable
from modelyard.serving.feedback import FeedbackStore, append_row
from modelyard.serving.limits import Limiter
from modelyard.serving.metrics import Exposition, Metrics
from modelyard.serving.options import ServeOptions
from modelyard.serving.service import Service
from modelyard.serving.shelf import Shelf
from modelyard.serving.tasks import Task
from modelyard.serving.traffic import Door, Mirror, Route, Traffic, Variant
from modelyard.storage import filesystem, is_remote, join, list_files

log = logging.getLogger(__name__)

APPLICATION = "modelyard"

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


class Ingress:
    """HTTP in front of the replicas of every version.

    What serves now comes as Serve's `user_config`, so that a change reaches a running ingress and a new one alike:
    `{"variants": [...]}`, as of `Variant`. Requests in progress end in the version that began them.

    Args:
        name: the model's name in the API.
        options: as `ServeOptions`.
        keys: digests of API keys and their holders, or None.
        replicas: the engines' handles; unused, but they make the engines part of the application.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], keys: Mapping[str, str] | None, *replicas: DeploymentHandle[Any]
    ) -> None:
        o = ServeOptions.model_validate(options)
        self._name, self._options, self._keys = name, o, keys
        self._feedback = FeedbackStore(o.feedback) if o.feedback else None
        self._limiter, self._cache = Limiter(o.limits), _cache(o)
        self._metrics, self._exposition = dict[str, Metrics](), Exposition()
        self._shadowed: dict[str, CollectorRegistry] = {}
        self._routes: dict[Variant, Route] = {}
        self._services: dict[str, Service] = {}
        self._traffic = Traffic(sticky=o.traffic.sticky)
        a = o.asynchronous
        self._tasks = Background(store_of(a, name), a.max_pending, a.webhooks) if a else None

    async def reconfigure(self, table: Mapping[str, Any]) -> None:
        """Serve's hook: the versions that serve from now on. A version already here keeps its application."""
        variants = [Variant(**fields) for fields in table["variants"]]
        routes = {v: self._routes.get(v) or await self._route(v) for v in variants}
        shadow = next((route for variant, route in routes.items() if variant.shadow), None)
        answering = [route for variant, route in routes.items() if not variant.shadow]
        self._traffic.adopt(answering, self._mirror(shadow) if shadow is not None else None)
        self._routes = routes
        self._services = {v.version: self._services[v.version] for v in variants}
        for version in self._metrics.keys() - self._services.keys():
            self._metrics[version].observe([])  # its engines are ending: no gauge keeps its last value

    async def versions(self) -> list[str]:
        """Versions requests are sent to now, the stable one first."""
        return [route.variant.version for route in self._routes.values()]

    async def _route(self, variant: Variant) -> Route:
        o, version = self._options, variant.version
        metrics = Metrics() if variant.shadow else self._metrics_of(version)
        cache, limiter = (None, None) if variant.shadow else (self._cache, self._limiter)
        self._services[version] = service = await _service(self._name, variant, o, metrics, cache, limiter)
        app = build_app(
            service, keys=self._keys, max_body=o.max_body, feedback=self._feedback, exposition=self._render,
            tasks=self._tasks,
        )  # fmt: skip
        return Route(variant, app)

    def _metrics_of(self, version: str) -> Metrics:
        if version not in self._metrics:
            self._metrics[version] = Metrics()
            self._exposition.add(version, self._metrics[version].registry)
        return self._metrics[version]

    def _mirror(self, route: Route) -> Mirror:
        shadow, version = self._options.traffic.shadow, route.variant.version
        if version not in self._shadowed:
            self._shadowed[version] = CollectorRegistry()
            self._exposition.add(version, self._shadowed[version])
            self._counts = SHADOW.counter(self._shadowed[version])
        counts, place = self._counts, shadow.log if shadow is not None else None

        def keep(row: Mapping[str, Any]) -> None:
            if place is not None:
                append_row(place, row)

        return Mirror(route, route.variant.share, count=lambda result: counts.labels(result).inc(), keep=keep,
                      texts=shadow is not None and shadow.texts)  # fmt: skip

    async def _render(self) -> bytes:
        for version, service in list(self._services.items()):
            if version in self._metrics:
                self._metrics[version].observe(await service.backend.stats())
        return self._exposition.render()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        app.add_middleware(Door, state=self._traffic)
        return app


async def _service(
    name: str, variant: Variant, o: ServeOptions, metrics: Metrics, cache: Cache | None, limiter: Limiter | None
) -> Service:
    """What turns requests into answers of one version's engines."""
    folder = await asyncio.to_thread(local_folder, variant.model, weights=False)
    return Service(
        name,
        await asyncio.to_thread(Tokenizer, folder),
        ServeBackend(serve.get_deployment_handle(engine_name(variant.version), APPLICATION)),
        max_length=read_config(folder).length(o.engine.max_length),
        max_choices=o.max_choices,
        timeout=o.request_timeout_s,
        metrics=metrics,
        cache=cache,
        share=o.cache is not None and o.cache.share,
        limiter=limiter,
        version=variant.version,
        adapters=tuple(o.adapters),
    )


class Consumer:
    """Answers asynchronous requests by the stable version's engines, as `user_config` names it.

    Args:
        name: the model's name in the API.
        options: as `ServeOptions`.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self._name, self._options = name, ServeOptions.model_validate(options)
        self._cache, self._ready = _cache(self._options), asyncio.Event()

    async def reconfigure(self, table: Mapping[str, Any]) -> None:
        """Serve's hook: tasks begun from now on are answered by this table's first version."""
        variant = Variant(**table["variants"][0])
        self._service = await _service(self._name, variant, self._options, Metrics(), self._cache, None)
        self._ready.set()

    @task_handler(name="answer")
    async def answer(self, task: Task) -> tuple[str, str]:
        """What becomes of a task, as `background.perform`."""
        await self._ready.wait()  # Serve starts the consumer before it brings the table
        return await perform(self._service, task)


def _cache(options: ServeOptions) -> MemoryCache | RedisCache | None:
    c = options.cache
    if c is None:
        return None
    return RedisCache(c.redis_url, c.ttl_s) if c.redis_url else MemoryCache(c.max_bytes, c.ttl_s)


def engine_name(version: str) -> str:
    """Name of the Serve deployment that computes a version."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in version)
    return f"engine-{safe}" if safe else "engine"


def build(
    name: str,
    options: ServeOptions,
    keys: Mapping[str, str] | None,
    variants: Sequence[Variant],
    others: Sequence[Variant] = (),
) -> serve.Application:
    """The Serve application of one model: an ingress, and a deployment of engine replicas for each version.

    Deployed again with other variants, engines and ingress that stay go on running: Serve compares their versions,
    which are fixed here by what decides them.

    Args:
        name: the model's name in the API.
        options: replicas, limits, engine.
        keys: digests of API keys and their holders, or None.
        variants: versions that requests go to, the stable one first; their folders are readable from every node.
        others: versions whose engines run besides: about to be used, or ending what they have begun.

    Raises:
        DataError: a folder cannot be served.
    """
    engines = {v.version: v for v in (*others, *variants)}
    for variant in engines.values():
        check_folder(local_folder(variant.model, weights=False))
    for place in options.adapters.values():
        check_adapter(local_folder(place, weights=False))
    # The engine queues what exceeds its slots, so that a freed slot is filled in the next step, not a round trip later.
    ongoing = options.engine.max_sequences * 2
    ingress = serve.deployment(serve.ingress()(Ingress)).options(  # type: ignore[attr-defined]
        name="ingress",
        # Room for two versions' replicas whatever runs: a changed bound would make Serve announce the ingress anew.
        max_ongoing_requests=2 * ongoing * options.autoscaling.max_replicas + options.max_queued + 64,
        graceful_shutdown_timeout_s=20,
        ray_actor_options={"num_cpus": 0},
        user_config={"variants": [asdict(v) for v in variants]},
        version="1",
        _internal=True,
    )
    bound: serve.Application = ingress.bind(
        name,
        options.model_dump(),
        dict(keys) if keys else None,
        *(_engine(v, options, ongoing) for v in engines.values()),
        *_consumer(name, options, variants),
    )
    return bound


def _consumer(name: str, options: ServeOptions, variants: Sequence[Variant]) -> list[Any]:
    """The deployment that answers asynchronous requests, if there are any."""
    a = options.asynchronous
    if a is None:
        return []
    config = TaskProcessorConfig(
        queue_name=name, adapter=RedisTasks, adapter_config=a.model_dump(), max_retries=0
    )  # fmt: skip
    consumer = serve.deployment(task_consumer(task_processor_config=config)(Consumer)).options(  # type: ignore[attr-defined]
        name="consumer",
        max_ongoing_requests=a.concurrency,
        ray_actor_options={"num_cpus": 0},
        user_config={"variants": [asdict(v) for v in variants if not v.shadow]},
        version="1",
        _internal=True,
    )
    return [consumer.bind(name, options.model_dump())]


def _engine(variant: Variant, options: ServeOptions, ongoing: int) -> Any:
    """The engine replicas of one version."""
    resources: dict[str, Any] = {"num_cpus": options.cpus_per_replica, "num_gpus": options.gpus_per_replica}
    engine = options.engine.model_dump()
    decides = repr((variant.model, engine, options.adapters, options.max_adapters, options.warm_up)).encode()
    replicas = serve.deployment(
        EngineReplica
    ).options(  # type: ignore[attr-defined]
        name=engine_name(variant.version),
        max_ongoing_requests=ongoing,
        max_queued_requests=options.max_queued,
        max_constructor_retry_count=3,  # a version that cannot start is given up soon, the one before goes on
        health_check_period_s=5,
        graceful_shutdown_timeout_s=20,
        ray_actor_options=resources,
        autoscaling_config=_autoscaling(options),
        request_router_config=RequestRouterConfig.model_validate(
            {
                "request_router_class": "modelyard.serving.affinity.AffinityRouter",
                "request_router_kwargs": {"imbalance": max(2, options.engine.max_sequences // 2)},
            }
        ),
        version=hashlib.sha256(decides).hexdigest()[:16],
        _internal=True,
    )
    return replicas.bind(variant.model, engine, options.adapters, options.max_adapters, warm=options.warm_up)


def _autoscaling(options: ServeOptions) -> dict[str, Any]:
    a, sequences = options.autoscaling, options.engine.max_sequences
    config: dict[str, Any] = {
        "min_replicas": a.min_replicas,
        "max_replicas": a.max_replicas,
        "upscale_delay_s": a.upscale_delay_s,
        "downscale_delay_s": a.downscale_delay_s,
        "target_ongoing_requests": a.target_requests or max(1.0, 0.75 * sequences),
        "look_back_period_s": 10.5,  # Serve wants more than its 10 s; a longer mean answers a rush too late
    }
    if a.target_requests is None:
        kwargs = {"kv_target": a.target_kv, "tokens_target": a.target_waiting_tokens, "sequences": sequences}
        config["policy"] = {"policy_function": "modelyard.serving.scaling:EngineLoad", "policy_kwargs": kwargs}
    return config
