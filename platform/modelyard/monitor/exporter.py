"""Shows the live numbers of running stages to Prometheus, from the process that drives the recipe.

Set `MODELYARD_METRICS_PORT` and `modelyard run` answers `GET /metrics` on 127.0.0.1 (or on
`MODELYARD_METRICS_HOST`). Without it nothing listens and a logged metric costs one comparison.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIServer

from modelyard.errors import ResourceError
from modelyard.monitor import metrics as m

if TYPE_CHECKING:
    from prometheus_client import Gauge

PORT, HOST = "MODELYARD_METRICS_PORT", "MODELYARD_METRICS_HOST"

_TRAINING = {
    "loss": m.TRAIN_LOSS,
    "heldout_loss": m.TRAIN_HELDOUT_LOSS,
    "tokens": m.TRAIN_TOKENS,
    "tokens_per_second": m.TRAIN_TOKENS_PER_SECOND,
    "learning_rate": m.TRAIN_LEARNING_RATE,
    "grad_norm": m.TRAIN_GRADIENT_NORM,
    "data_wait": m.TRAIN_DATA_WAIT,
}
_CURATION = {
    "documents_in": m.CURATE_DOCUMENTS_READ,
    "documents": m.CURATE_DOCUMENTS_KEPT,
    "bytes_in": m.CURATE_BYTES_READ,
    "bytes": m.CURATE_BYTES_KEPT,
}
BY_KIND: Mapping[str, Mapping[str, m.Metric]] = {"pretrain": _TRAINING, "finetune": _TRAINING, "curate": _CURATION}
"""Stage kind -> name that the stage logs -> metric that Prometheus sees."""


class Exporter:
    """Gauges of running stages in a registry of their own. `port` and `host` say where it listens."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        self.registry = CollectorRegistry()
        gauges = m.TRAINING + m.CURATION
        self._gauges: dict[str, Gauge] = {metric.name: metric.gauge(self.registry) for metric in gauges}
        self._server: WSGIServer
        self._thread: Thread
        try:
            self._server, self._thread = start_http_server(port, host, self.registry)
        except (OSError, OverflowError) as error:
            raise ResourceError(
                f"the metrics port cannot be used: {error}",
                place=f"{host}:{port}",
                mend=f"set {PORT} to a free port, or unset it",
            ) from error
        self.host, self.port = host, int(self._server.server_port)

    def observe(self, recipe: str, stage: str, kind: str, values: Mapping[str, float], step: int | None) -> None:
        """Takes over what a stage logs; names without a metric of their own are left out."""
        known = BY_KIND.get(kind, {})
        for name, value in values.items():
            if name in known:
                self._gauges[known[name].name].labels(recipe, stage).set(value)
        if step is not None and known is _TRAINING:
            self._gauges[m.TRAIN_STEP.name].labels(recipe, stage).set(step)

    def forget(self, recipe: str, stage: str) -> None:
        """Drops a stage's training gauges when it has ended: a finished run must not look stalled."""
        for metric in m.TRAINING:
            self._gauges[metric.name].remove_by_labels({"recipe": recipe, "stage": stage})

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


def from_environment() -> Exporter | None:
    """The exporter that `MODELYARD_METRICS_PORT` asks for, or None.

    Raises:
        ResourceError: the port is in use or is not a number.
    """
    port = os.environ.get(PORT)
    if not port:
        return None
    if not port.isdigit():
        raise ResourceError(f"{port!r} is not a port", place=PORT, mend="set it to a number such as 9400")
    return Exporter(int(port), os.environ.get(HOST, "127.0.0.1"))
