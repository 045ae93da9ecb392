"""Requests answered later, in Redis: submitted, taken by workers, kept with their results. Knows nothing of Ray.

A task is a hash; its id waits in a stream, whose consumer group remembers who works on it. A worker renews its lease
while it works, so that the task of one that died goes to another after `lease_s`: every task is answered at least once.
The prompt is removed when the task ends; the result after `keep_s`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from modelyard.serving.errors import ApiError
from modelyard.serving.redis_client import redis_client

log = logging.getLogger(__name__)

ENDED = frozenset({"completed", "failed", "cancelled"})
ATTEMPTS = 3
"""Workers that may die over a task before it counts as failed."""
BEAT_SECONDS = 1.0
"""Between looks at what was cancelled; leases are renewed then, too."""
_PREFIX, _GROUP = "modelyard:task:", "workers"
# Whoever ends a task first decides how: a worker that finishes what was cancelled changes nothing.
_END = """
local status = redis.call('HGET', KEYS[1], 'status')
if status ~= 'queued' and status ~= 'in_progress' then return 0 end
redis.call('HSET', KEYS[1], unpack(ARGV, 2))
redis.call('HDEL', KEYS[1], 'body')
redis.call('EXPIRE', KEYS[1], ARGV[1])
return 1
"""


@dataclass(frozen=True)
class Task:
    """One request and what became of it.

    Attributes:
        id: names it to its owner.
        endpoint: the route that would have answered at once, such as `/v1/chat/completions`.
        holder: name of the API key that asked; others do not see the task.
        body: the request as JSON; empty once it has ended.
        status: queued, in_progress, completed, failed or cancelled.
        created: seconds since the epoch.
        finished: the same, 0 before the end.
        webhook: where to tell the end, empty = nowhere.
        result: the answer, or an object with `error`, as JSON; empty before the end.
    """

    id: str
    endpoint: str
    holder: str
    body: str
    status: str = "queued"
    created: int = 0
    finished: int = 0
    webhook: str = ""
    result: str = ""

    def public(self) -> dict[str, Any]:
        """As the API shows it."""
        outcome = json.loads(self.result) if self.result else {}
        return {
            "id": self.id, "object": "async.task", "endpoint": self.endpoint, "status": self.status,
            "created_at": self.created, "finished_at": self.finished or None,
            "response": outcome if self.status == "completed" else None, "error": outcome.get("error"),
        }  # fmt: skip


def new_task(endpoint: str, holder: str, body: str, webhook: str = "") -> Task:
    """A task that nobody has seen yet."""
    return Task(f"task-{uuid.uuid4().hex}", endpoint, holder, body, created=int(time.time()), webhook=webhook)


class TaskStore:
    """Tasks of one queue in Redis. Belongs to one event loop.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        queue: name of the queue, one for each served model.
        keep_s: seconds a result is kept.
        lease_s: seconds without a sign of life after which a worker's tasks go to another.

    Raises:
        ResourceError: the client library is not installed, or the URL is none.
    """

    def __init__(self, url: str, queue: str, keep_s: float, lease_s: float) -> None:
        self._redis = redis_client(
            url, "asynchronous.redis_url", decode_responses=True, socket_connect_timeout=5.0, socket_timeout=10.0
        )
        self._stream, self._keep, self.lease = f"modelyard:tasks:{queue}", max(1, int(keep_s)), lease_s
        self._end = self._redis.register_script(_END)

    async def submit(self, task: Task) -> None:
        """Queues a task."""
        async with self._redis.pipeline(transaction=True) as both:
            both.hset(_PREFIX + task.id, mapping={k: v for k, v in vars(task).items() if k != "id"})
            both.xadd(self._stream, {"id": task.id})
            await both.execute()

    async def pending(self) -> int:
        """Tasks that have not ended."""
        return int(await self._redis.xlen(self._stream))

    async def get(self, name: str) -> Task | None:
        """A task by its id, None when there is none (any more)."""
        found = await self._redis.hgetall(_PREFIX + name)
        if not found:
            return None
        fields = {k: v for k, v in found.items() if k in Task.__dataclass_fields__}
        for number in ("created", "finished"):
            fields[number] = int(fields.get(number, 0))
        return Task(id=name, **({"body": ""} | fields))

    async def end(self, name: str, status: str, result: str = "") -> bool:
        """Ends a task; False when it has ended before or is unknown."""
        given: list[str | int] = ["status", status, "result", result, "finished", int(time.time())]
        return bool(await self._end(keys=[_PREFIX + name], args=[self._keep, *given]))

    async def take(self, worker: str, wait_s: float) -> tuple[str, str] | None:
        """The next entry for a worker: its name in the stream and its task's id. None when there is none.

        First those of workers that gave no sign of life. Waits `wait_s` for one to come.
        """
        from redis.exceptions import ResponseError

        try:
            lost = await self._redis.xautoclaim(
                self._stream, _GROUP, worker, min_idle_time=int(self.lease * 1000), count=1
            )
            entries = lost[1]
            if not entries:
                new = await self._redis.xreadgroup(
                    _GROUP, worker, {self._stream: ">"}, count=1, block=max(1, int(wait_s * 1000))
                )
                entries = new[0][1] if new else []
        except ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            with suppress(ResponseError):  # another worker was faster
                await self._redis.xgroup_create(self._stream, _GROUP, id="0", mkstream=True)
            return None
        if not entries:
            return None
        entry, fields = entries[0]
        return entry, fields["id"]

    async def begin(self, name: str) -> Task | None:
        """A task a worker has taken, ended if too many were lost over it; None when it is gone."""
        task = await self.get(name)
        if task is None or task.status in ENDED:
            return task
        attempts = int(await self._redis.hincrby(_PREFIX + name, "attempts", 1))
        if attempts > ATTEMPTS:
            error = ApiError(500, f"{ATTEMPTS} workers were lost over this request", kind="server_error", code="lost")
            await self.end(name, "failed", json.dumps(error.body()))
            return await self.get(name)
        await self._redis.hset(_PREFIX + name, "status", "in_progress")
        return replace(task, status="in_progress")

    async def renew(self, worker: str, entries: list[str]) -> None:
        """A sign of life for entries a worker holds."""
        await self._redis.xclaim(self._stream, _GROUP, worker, 0, entries, justid=True)

    async def done(self, entry: str) -> None:
        """Removes an entry from the queue."""
        async with self._redis.pipeline(transaction=True) as both:
            both.xack(self._stream, _GROUP, entry)
            both.xdel(self._stream, entry)
            await both.execute()

    async def close(self) -> None:
        """Ends the connections."""
        await self._redis.aclose()


class Worker:
    """Takes tasks from a store and answers them, several at a time.

    Args:
        store: where tasks are.
        answer: makes `completed` or `failed` and the JSON of the result.
        tell: is called with every ended task, for webhooks.
        concurrency: tasks at a time.
    """

    def __init__(
        self, store: TaskStore, answer: Callable[[Task], Awaitable[tuple[str, str]]],
        tell: Callable[[Task], Awaitable[None]], concurrency: int,
    ) -> None:  # fmt: skip
        self._store, self._answer, self._tell, self._most = store, answer, tell, concurrency
        self._name = uuid.uuid4().hex
        self._running: dict[str, tuple[str, asyncio.Task[None]]] = {}

    async def run(self) -> None:
        """Works until it is cancelled; Redis that is away is waited for."""
        from redis.exceptions import RedisError

        beat = asyncio.create_task(self._beat())
        try:
            while True:
                _heed_cancellation()
                try:
                    await self._next()
                except (RedisError, OSError) as error:
                    log.warning("the task queue is away: %s", type(error).__name__)
                    await asyncio.sleep(BEAT_SECONDS)
        finally:
            tasks = [beat, *(task for _, task in self._running.values())]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _next(self) -> None:
        if len(self._running) >= self._most:
            await asyncio.wait([t for _, t in self._running.values()], return_when=asyncio.FIRST_COMPLETED)
        taken = await self._store.take(self._name, wait_s=BEAT_SECONDS)
        if taken is None:
            return
        entry, name = taken
        if entry in self._running:
            return  # a late sign of life made it look lost
        task = await self._store.begin(name)
        if task is None:
            await self._store.done(entry)
            return
        work = asyncio.create_task(self._work(entry, task))
        self._running[entry] = task.id, work
        work.add_done_callback(lambda _: self._running.pop(entry, None))

    async def _work(self, entry: str, task: Task) -> None:
        try:
            if task.status not in ENDED:
                await self._store.end(task.id, *await self._answer(task))
        except asyncio.CancelledError:
            ended = await self._store.get(task.id)
            if ended is None or ended.status not in ENDED:
                raise  # this worker is stopping, and another takes over
        except Exception as error:  # Redis is away: the entry stays with this worker until its lease is over
            log.error("a task could not be ended: %s", type(error).__name__)
            return
        # Told before it leaves the queue: a worker that dies meanwhile is followed by one that tells again.
        if (ended := await self._store.get(task.id)) is not None and ended.webhook:
            await self._tell(ended)
        await self._store.done(entry)

    async def _beat(self) -> None:
        from redis.exceptions import RedisError

        while True:
            _heed_cancellation()
            await asyncio.sleep(min(BEAT_SECONDS, self._store.lease / 3))
            with suppress(RedisError, OSError):
                if self._running:
                    await self._store.renew(self._name, list(self._running))
                for name, work in list(self._running.values()):
                    found = await self._store.get(name)
                    if found is not None and found.status == "cancelled":
                        work.cancel()


def _heed_cancellation() -> None:
    """Raises what a call to Redis may have swallowed.

    On Python 3.11 waiting with a time limit loses a cancellation that comes as the answer does.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
