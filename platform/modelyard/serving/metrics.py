"""Prometheus metrics of the HTTP side, and of the engines at the moment they are asked for."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from modelyard.engine.request import EngineStats, StepOutput
from modelyard.monitor import metrics as names
from modelyard.serving.backend import Backend


class Metrics:
    """All metrics of one ingress process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # one more series a metric that nobody reads
        self.registry = CollectorRegistry()
        self.requests = names.REQUESTS.counter(self.registry)
        self.errors = names.ERRORS.counter(self.registry)
        self.seconds = names.REQUEST_SECONDS.histogram(self.registry)
        tokens = names.TOKENS.counter(self.registry)
        self.prompt_tokens, self.completion_tokens = tokens.labels("prompt"), tokens.labels("completion")
        cache = names.CACHE.counter(self.registry)
        self.cache_hits, self.cache_misses = cache.labels("hit"), cache.labels("miss")
        self.first_token = names.TIME_TO_FIRST_TOKEN.histogram(self.registry)
        self.next_token = names.INTER_TOKEN.histogram(self.registry)
        self.queue = names.QUEUE.histogram(self.registry)
        self._occupancy = names.BATCH_OCCUPANCY.gauge(self.registry)
        self._slots = names.KV_SLOTS_USED.gauge(self.registry)
        self._kv, self._prefix = names.KV_USED.gauge(self.registry), names.PREFIX_HITS.gauge(self.registry)
        self._replicas = names.REPLICAS.gauge(self.registry)
        self._unread = names.UNREAD.counter(self.registry)

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)

    async def ask(self, backend: Backend) -> None:
        """Sets the gauges to what the engines say of themselves now; where one does not, they stay as they are."""
        try:
            engines = await backend.stats()
        except TimeoutError:
            self._unread.inc()
        else:
            self.observe(engines)

    def observe(self, engines: Sequence[EngineStats]) -> None:
        """Sets the gauges to what the engines say of themselves now."""
        self._occupancy.set(sum(e.last_batch if e.running else 0 for e in engines))
        self._slots.set(sum(e.running for e in engines))
        self._kv.set(_share(sum(e.blocks_used for e in engines), sum(e.blocks for e in engines)))
        asked = sum(e.prefix_asked_tokens_total for e in engines)
        self._prefix.set(_share(sum(e.prefix_hit_tokens_total for e in engines), asked))
        self._replicas.set(len(engines))

    def watch(self, prompt_tokens: int) -> Watch:
        """Starts timing one answer."""
        self.prompt_tokens.inc(prompt_tokens)
        return Watch(self)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


class Exposition(Collector):
    """The metrics of several versions as one page: every sample carries the version it belongs to, if it has a name.

    A version's counters stay after it is gone, as counters should.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[CollectorRegistry]] = {}

    def add(self, version: str, registry: CollectorRegistry) -> None:
        """Shows a registry's metrics under a version."""
        self._parts.setdefault(version, []).append(registry)

    def collect(self) -> Iterator[Family]:
        """prometheus_client's hook: one family a metric, all versions together."""
        families: dict[str, Family] = {}
        for version, registries in self._parts.items():
            label = {"version": version} if version else {}
            for family in (found for registry in registries for found in registry.collect()):
                merged = families.setdefault(family.name, Family(family.name, family.documentation, family.type))
                merged.samples += [s._replace(labels=s.labels | label) for s in family.samples]
        yield from families.values()

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)


class Watch:
    """Times one answer: first token, then the average gap of each message that arrives."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last = time.perf_counter()
        self._first = True

    def saw(self, output: StepOutput) -> None:
        """Records one message of the answer."""
        count = len(output.tokens)
        if not count:
            return
        now = time.perf_counter()
        gap, self._last = now - self._last, now
        self._metrics.completion_tokens.inc(count)
        if self._first:
            self._metrics.first_token.observe(gap)
            self._metrics.queue.observe(output.waited)
            self._first = False
            return
        for _ in range(count):
            self._metrics.next_token.observe(gap / count)
