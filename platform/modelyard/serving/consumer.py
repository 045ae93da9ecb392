"""Ray Serve's task consumer over our task queue: a deployment whose replicas take tasks and ask the engine replicas.

Serve's own adapters bring Celery or Taskiq; neither gives a lost worker's task to another within seconds, runs
asynchronous handlers in the replica's event loop, and stops an answer that was cancelled, all of which this one does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from ray.serve.schema import TaskProcessorAdapter, TaskProcessorConfig, TaskResult

from modelyard.serving.options import AsyncOptions
from modelyard.serving.tasks import Task, TaskStore, Worker, new_task
from modelyard.serving.webhooks import Messenger, read_secret

Handler = Callable[[Task], Awaitable[tuple[str, str]]]


def store_of(options: AsyncOptions, queue: str) -> TaskStore:
    """The store these options name. Raises ResourceError as `TaskStore`."""
    return TaskStore(options.redis_url, queue, options.keep_s, options.lease_s)


class RedisTasks(TaskProcessorAdapter):
    """Serve's adapter protocol over :class:`TaskStore` and :class:`Worker`. Asynchronous only, one handler.

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

    async def enqueue_task_async(self, task_name: str, args: Any = None, kwargs: Any = None, **_: Any) -> TaskResult:
        """Queues `kwargs` (endpoint, holder, body, webhook) as a task."""
        task = new_task(**(kwargs or {}))
        await self._store.submit(task)
        return TaskResult(id=task.id, status=task.status, created_at=task.created, result=None)

    async def get_task_status_async(self, task_id: str) -> TaskResult:
        """Status and result of a task."""
        task = await self._store.get(task_id)
        return TaskResult(id=task_id, status=task.status if task else "unknown", result=task.result if task else None)

    async def cancel_task_async(self, task_id: str) -> None:
        """Ends a task that has not ended."""
        await self._store.end(task_id, "cancelled")

    async def get_metrics_async(self) -> dict[str, Any]:
        """Tasks that have not ended."""
        return {"pending": await self._store.pending()}

    async def health_check_async(self) -> list[dict[str, Any]]:
        """Whether this replica takes tasks."""
        return [{"consuming": self._work is not None and not self._work.done()}]

    def enqueue_task_sync(self, task_name: str, args: Any = None, kwargs: Any = None, **_: Any) -> TaskResult:
        """Not offered: this adapter lives in an event loop."""
        raise NotImplementedError("use enqueue_task_async")

    def get_task_status_sync(self, task_id: str) -> TaskResult:
        """Not offered, as above."""
        raise NotImplementedError("use get_task_status_async")

    def cancel_task_sync(self, task_id: str) -> None:
        """Not offered, as above."""
        raise NotImplementedError("use cancel_task_async")

    def get_metrics_sync(self) -> dict[str, Any]:
        """Not offered, as above."""
        raise NotImplementedError("use get_metrics_async")

    def health_check_sync(self) -> list[dict[str, Any]]:
        """Not offered, as above."""
        raise NotImplementedError("use health_check_async")
