"""Ray Serve's task consumer over our task queue: a deployment whose replicas take tasks and ask the engine replicas.

Serve's own adapters bring Celery or Taskiq; neither gives a lost worker's task to another within seconds, runs
asynchronous handlers in the replica's event loop, and stops an answer that was cancelled, all of which this one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray.serve.schema import TaskProcessorAdapter, TaskProcessorConfig

from modelyard.serving.options import AsyncOptions
from modelyard.serving.tasks import Task, TaskStore, Worker
from modelyard.serving.webhooks import Messenger, read_secret

Handler = Callable[[Task], Awaitable[tuple[str, str]]]


def store_of(options: AsyncOptions, queue: str) -> TaskStore:
    """The store these options name. Raises ResourceError as `TaskStore`."""
    return TaskStore(options.redis_url, queue, options.keep_s, options.lease_s)


class RedisTasks(TaskProcessorAdapter):
    """The consuming half of Serve's adapter protocol over :class:`TaskStore` and :class:`Worker`, for one handler.

    `config.adapter_config` holds :class:`AsyncOptions` as a mapping.
    """

    def __init__(self, config: TaskProcessorConfig) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._options = AsyncOptions.model_validate(config.adapter_config)
        self._queue = config.queue_name
        self._handler: Handler | None = None
        self._work: asyncio.Task[None] | None = None

    def initialize(self, consumer_concurrency: int = 1) -> None:
        """Connects when first used."""
        self._store, self._concurrency = store_of(self._options, self._queue), consumer_concurrency

    def register_task_handle(self, func: Handler, name: str | None = None) -> None:
        """The one handler of every task."""
        self._handler = func

    def start_consumer(self, **_: Any) -> None:
        """Works in the running event loop until `stop_consumer`."""
        assert self._handler is not None, "Serve registers handlers before it starts the consumer"
        secret = read_secret(Path(self._options.webhook_secret)) if self._options.webhook_secret else None
        worker = Worker(self._store, self._handler, Messenger(secret).tell, self._concurrency)
        self._work = asyncio.get_running_loop().create_task(worker.run())

    def stop_consumer(self, timeout: float = 10.0) -> None:
        """Stops; tasks in progress go to another replica when their lease is over."""
        if self._work is not None and not self._work.get_loop().is_closed():
            self._work.get_loop().call_soon_threadsafe(self._work.cancel)

    def _elsewhere(self, *_: Any, **__: Any) -> Any:
        """Not offered, though Serve's protocol asks for it: tasks are submitted and looked at through the ingress."""
        raise NotImplementedError("ask the ingress, under /v1/async/")

    enqueue_task_sync = get_task_status_sync = cancel_task_sync = get_metrics_sync = health_check_sync = _elsewhere
