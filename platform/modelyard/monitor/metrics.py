"""Every Prometheus metric of modelyard: its name, kind, labels and buckets, in one place.

Serving, training and curation build their metric objects from these specifications, and dashboards and
alert rules are generated from the same names, so that a panel can never ask for a metric nobody writes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: name in Prometheus; a counter ends in `_total`, a time in `_seconds`.
        kind: counter, gauge or histogram.
        help: one sentence with the unit.
        labels: label names.
        buckets: upper bounds of a histogram's buckets, in the metric's unit.
    """

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    def counter(self, registry: CollectorRegistry | None = None) -> Counter:
        """The prometheus_client counter, in `registry` or the default one."""
        from prometheus_client import REGISTRY, Counter

        self._expect("counter")
        return Counter(self.name, self.help, self.labels, registry=registry or REGISTRY)

    def gauge(self, registry: CollectorRegistry | None = None) -> Gauge:
        """The prometheus_client gauge, in `registry` or the default one."""
        from prometheus_client import REGISTRY, Gauge

        self._expect("gauge")
        return Gauge(self.name, self.help, self.labels, registry=registry or REGISTRY)

    def histogram(self, registry: CollectorRegistry | None = None) -> Histogram:
        """The prometheus_client histogram, in `registry` or the default one."""
        from prometheus_client import REGISTRY, Histogram

        self._expect("histogram")
        return Histogram(self.name, self.help, self.labels, buckets=self.buckets, registry=registry or REGISTRY)

    def _expect(self, kind: Kind) -> None:
        if self.kind != kind:
            raise TypeError(f"{self.name} is a {self.kind}, not a {kind}")

    @property
    def series(self) -> tuple[str, ...]:
        """The series names Prometheus stores."""
        if self.kind != "histogram":
            return (self.name,)
        return (f"{self.name}_bucket", f"{self.name}_sum", f"{self.name}_count")


# A first token takes milliseconds (cached prefix) to a minute (cold start); a next one a tenth of that.
_FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3.0, 6.0, 12.0, 30.0, 60.0)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 3.0)
_WAIT = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0)
_REQUEST = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

REQUESTS = Metric("modelyard_requests_total", "counter", "Requests answered.", ("endpoint", "code"))
ERRORS = Metric("modelyard_errors_total", "counter", "Requests that failed, by type of error.", ("type",))
TOKENS = Metric("modelyard_tokens_total", "counter", "Tokens: direction is prompt or completion.", ("direction",))
CACHE = Metric("modelyard_response_cache_total", "counter", "Cacheable answers: result is hit or miss.", ("result",))
TIME_TO_FIRST_TOKEN = Metric(
    "modelyard_time_to_first_token_seconds", "histogram", "Seconds from arrival to the first token.", (), _FIRST_TOKEN
)
INTER_TOKEN = Metric(
    "modelyard_inter_token_seconds", "histogram", "Seconds between two tokens of one request.", (), _NEXT_TOKEN
)
QUEUE = Metric("modelyard_queue_seconds", "histogram", "Seconds a request waited for its first step.", (), _WAIT)
REQUEST_SECONDS = Metric(
    "modelyard_request_seconds", "histogram", "Seconds from arrival to the last byte.", ("endpoint",), _REQUEST
)
BATCH_OCCUPANCY = Metric("modelyard_batch_occupancy", "gauge", "Requests in the last engine step.")
KV_SLOTS_USED = Metric("modelyard_kv_slots_used", "gauge", "KV-cache slots in use.")
KV_USED = Metric("modelyard_kv_used_ratio", "gauge", "Share of the engines' KV blocks that requests hold.")
PREFIX_HITS = Metric(
    "modelyard_prefix_hit_ratio", "gauge", "Share of prompt tokens that the running engines took from the prefix cache."
)
REPLICAS = Metric("modelyard_replicas", "gauge", "Engine replicas that answer.")
UNREAD = Metric(
    "modelyard_engine_stats_missed_total", "counter",
    "Times an engine replica did not say how it is: the engines' gauges kept what they showed.",
)  # fmt: skip
SHADOW = Metric(
    "modelyard_shadow_answers_total", "counter",
    "Copies answered in the shadow: result is same, different, failed or dropped.", ("result",),
)  # fmt: skip

_STAGE = ("recipe", "stage")
TRAIN_LOSS = Metric("modelyard_train_loss", "gauge", "Training loss, nats a token.", _STAGE)
TRAIN_HELDOUT_LOSS = Metric("modelyard_train_heldout_loss", "gauge", "Held-out loss, nats a token.", _STAGE)
TRAIN_STEP = Metric("modelyard_train_step", "gauge", "Optimizer steps done.", _STAGE)
TRAIN_TOKENS = Metric("modelyard_train_tokens", "gauge", "Tokens trained on so far.", _STAGE)
TRAIN_TOKENS_PER_SECOND = Metric("modelyard_train_tokens_per_second", "gauge", "Tokens a second, all workers.", _STAGE)
TRAIN_LEARNING_RATE = Metric("modelyard_train_learning_rate", "gauge", "Learning rate.", _STAGE)
TRAIN_GRADIENT_NORM = Metric("modelyard_train_gradient_norm", "gauge", "Gradient norm before clipping.", _STAGE)
TRAIN_DATA_WAIT = Metric("modelyard_train_data_wait_ratio", "gauge", "Share of a step spent waiting for data.", _STAGE)

CURATE_DOCUMENTS_READ = Metric("modelyard_curate_documents_read", "gauge", "Documents read.", _STAGE)
CURATE_DOCUMENTS_KEPT = Metric("modelyard_curate_documents_kept", "gauge", "Documents kept.", _STAGE)
CURATE_BYTES_READ = Metric("modelyard_curate_read_bytes", "gauge", "UTF-8 bytes read.", _STAGE)
CURATE_BYTES_KEPT = Metric("modelyard_curate_kept_bytes", "gauge", "UTF-8 bytes kept.", _STAGE)

SERVING = (
    REQUESTS, ERRORS, TOKENS, CACHE, TIME_TO_FIRST_TOKEN, INTER_TOKEN, QUEUE, REQUEST_SECONDS, BATCH_OCCUPANCY,
    KV_SLOTS_USED, KV_USED, PREFIX_HITS, REPLICAS, UNREAD, SHADOW,
)  # fmt: skip
TRAINING = (
    TRAIN_LOSS, TRAIN_HELDOUT_LOSS, TRAIN_STEP, TRAIN_TOKENS, TRAIN_TOKENS_PER_SECOND, TRAIN_LEARNING_RATE,
    TRAIN_GRADIENT_NORM, TRAIN_DATA_WAIT,
)  # fmt: skip
CURATION = (CURATE_DOCUMENTS_READ, CURATE_DOCUMENTS_KEPT, CURATE_BYTES_READ, CURATE_BYTES_KEPT)
ALL = SERVING + TRAINING + CURATION

RAY = (
    "ray_node_cpu_utilization", "ray_node_cpu_count", "ray_node_mem_used", "ray_node_mem_total", "ray_node_disk_usage",
    "ray_node_disk_free", "ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available",
    "ray_object_store_memory", "ray_tasks", "ray_actors", "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_queued_queries", "ray_serve_deployment_error_counter_total",
    "ray_serve_deployment_processing_latency_ms_bucket",
)  # fmt: skip
"""Series that Ray itself exports and dashboards and rules read (names of Ray 2.60)."""
