"""What speaks HTTP, and what answers asynchronous requests: both ask the engine replicas of every version.

They tokenize and check, so that what reaches a replica's queue can run.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from prometheus_client import CollectorRegistry, Counter
from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.task_consumer import task_handler

from modelyard.engine.checkpoint import read_config
from modelyard.engine.tokenizer import Tokenizer
from modelyard.monitor.metrics import SHADOW
from modelyard.serving.api import build_app
from modelyard.serving.background import Background, perform
from modelyard.serving.cache import Cache, MemoryCache, RedisCache
from modelyard.serving.consumer import store_of
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.folders import local_folder
from modelyard.serving.limits import Limiter
from modelyard.serving.lines import append_row
from modelyard.serving.listener import Listener
from modelyard.serving.metrics import Exposition, Metrics
from modelyard.serving.middleware import RequestId
from modelyard.serving.names import APPLICATION, engine_name
from modelyard.serving.options import ServeOptions
from modelyard.serving.replicas import ServeBackend
from modelyard.serving.service import Service
from modelyard.serving.tasks import Task
from modelyard.serving.traffic import Door, Mirror, Route, Traffic, Variant


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

    _feedback: FeedbackStore | None = None
    _listener: Listener | None = None

    def __init__(
        self, name: str, options: Mapping[str, Any], keys: Mapping[str, str] | None, *replicas: DeploymentHandle[Any]
    ) -> None:
        o = ServeOptions.model_validate(options)
        self._name, self._options, self._keys = name, o, keys
        self._feedback = FeedbackStore(o.feedback) if o.feedback else None
        self._limiter, self._cache = Limiter(o.limits), _cache(o)
        self._metrics, self._exposition = dict[str, Metrics](), Exposition()
        self._shadowed: dict[str, Counter] = {}
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
        if self._options.listens and self._listener is None:
            self._listener = await Listener.start(RequestId(Door(_empty(), self._traffic)), self._options)

    async def versions(self) -> list[str]:
        """Versions requests are sent to now, the stable one first."""
        return [route.variant.version for route in self._routes.values()]

    async def busy(self) -> dict[str, int]:
        """Requests in progress by version, from their arrival until their answer has been sent."""
        return dict(self._traffic.busy)

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
            registry = CollectorRegistry()
            self._exposition.add(version, registry)
            self._shadowed[version] = SHADOW.counter(registry)
        counts, place = self._shadowed[version], shadow.log if shadow is not None else None

        def keep(row: Mapping[str, Any]) -> None:
            if place is not None:
                append_row(place, row)

        return Mirror(route, route.variant.share, count=lambda result: counts.labels(result).inc(), keep=keep,
                      texts=shadow is not None and shadow.texts)  # fmt: skip

    async def _render(self) -> bytes:
        known = [(self._metrics[v], service.backend) for v, service in self._services.items() if v in self._metrics]
        await asyncio.gather(*(metrics.ask(backend) for metrics, backend in known))
        return self._exposition.render()

    async def __del__(self) -> None:
        """Serve's hook at a graceful stop."""
        if self._listener is not None:
            await self._listener.stop()
        if self._feedback is not None:
            self._feedback.close()

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = _empty()
        app.add_middleware(Door, state=self._traffic)
        return app


def _empty() -> FastAPI:
    """An application without a route."""
    return FastAPI(openapi_url=None, docs_url=None, redoc_url=None)


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
