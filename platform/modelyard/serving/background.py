"""Asynchronous answers over HTTP: the same bodies under `/v1/async/`, a task to poll, and how a worker answers one."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse

from modelyard.serving import describe
from modelyard.serving.answers import ChatForm, TextForm, embeddings_object
from modelyard.serving.errors import ApiError, unavailable
from modelyard.serving.middleware import holder_of
from modelyard.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest
from modelyard.serving.service import Job, Service
from modelyard.serving.tasks import ENDED, Task, TaskStore, new_task
from modelyard.serving.webhooks import allowed

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = ChatRequest | CompletionRequest | EmbeddingRequest
BODIES: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
}
BUSY_SECONDS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 30.0, 30.0, 30.0, 30.0, 30.0)
"""Waits of a worker for an engine that is busy or away, before the task fails."""


class Background:
    """What submitting needs.

    Args:
        store: keeps tasks.
        most: tasks that may wait or run; more are refused.
        webhooks: prefixes of addresses that may be told.
    """

    def __init__(self, store: TaskStore, most: int, webhooks: Sequence[str]) -> None:
        self._store, self._most, self._webhooks = store, most, tuple(webhooks)

    async def submit(self, task: Task) -> None:
        """Queues a task. Raises ApiError for a webhook that is not allowed, a full queue, and Redis that is away."""
        if task.webhook and not allowed(task.webhook, self._webhooks):
            raise ApiError(400, "this server does not send webhooks to that address", param="webhook")
        if await self._ask(self._store.pending()) >= self._most:
            raise ApiError(
                429, "too many tasks wait; try again", kind="rate_limit_error", code="overloaded", retry_after=30
            )
        await self._ask(self._store.submit(task))

    async def find(self, name: str, holder: str) -> Task:
        """A holder's task. Raises a 404 ApiError for an unknown one and for another's alike."""
        task = await self._ask(self._store.get(name))
        if task is None or task.holder != holder:
            raise ApiError(404, "there is no such task, or its result is no longer kept", code="task_not_found")
        return task

    async def cancel(self, name: str, holder: str) -> Task:
        """Ends a holder's task if it has not ended. Raises ApiError as `find`."""
        task = await self.find(name, holder)
        if task.status in ENDED:
            return task
        await self._ask(self._store.end(name, "cancelled"))
        return await self.find(name, holder)

    async def _ask(self, work: Awaitable[T]) -> T:
        from redis.exceptions import RedisError

        try:
            return await work
        except (RedisError, OSError) as error:
            log.warning("the task queue is away: %s", type(error).__name__)
            raise unavailable("tasks cannot be reached now; try again") from None


def routes(app: FastAPI, service: Service, background: Background | None) -> None:
    """Adds the routes; without a `background` they answer 404."""

    def ready() -> Background:
        if background is None:
            raise ApiError(404, "this server takes no asynchronous requests", code="async_off")
        return background

    async def submit(endpoint: str, body: Body, request: Request, webhook: str | None) -> JSONResponse:
        there, holder = ready(), holder_of(request)
        if getattr(body, "stream", False):
            raise ApiError(400, "an asynchronous answer cannot be streamed", param="stream")
        await _jobs(service, body, holder)  # whatever is wrong with it is said now, and its tokens counted
        body = body.model_copy(
            update={"priority": service.priority(body.priority, holder)}
        )  # the worker knows no limits
        task = new_task(endpoint, holder, body.model_dump_json(exclude_unset=True, by_alias=True), webhook or "")
        await there.submit(task)
        return JSONResponse(task.public(), 202)

    answers = describe.answers(describe.TASK, status=202)
    hook = Header(None, alias="x-webhook", max_length=2048, description="address that is told of the end")

    @app.post("/v1/async/chat/completions", response_model=None, status_code=202, responses=answers)
    async def chat(body: ChatRequest, request: Request, webhook: str | None = hook) -> JSONResponse:
        return await submit("/v1/chat/completions", body, request, webhook)

    @app.post("/v1/async/completions", response_model=None, status_code=202, responses=answers)
    async def completions(body: CompletionRequest, request: Request, webhook: str | None = hook) -> JSONResponse:
        return await submit("/v1/completions", body, request, webhook)

    @app.post("/v1/async/embeddings", response_model=None, status_code=202, responses=answers)
    async def embeddings(body: EmbeddingRequest, request: Request, webhook: str | None = hook) -> JSONResponse:
        return await submit("/v1/embeddings", body, request, webhook)

    @app.get("/v1/async/{name}", response_model=None, responses=describe.answers(describe.TASK))
    async def poll(name: str, request: Request) -> JSONResponse:
        return JSONResponse((await ready().find(name, holder_of(request))).public())

    @app.post("/v1/async/{name}/cancel", response_model=None, responses=describe.answers(describe.TASK))
    async def cancel(name: str, request: Request) -> JSONResponse:
        return JSONResponse((await ready().cancel(name, holder_of(request))).public())


async def _jobs(service: Service, body: Body, holder: str) -> tuple[list[Job], ChatForm | TextForm]:
    """A body's jobs, and the form of its answer. Raises ApiError for what cannot run."""
    if isinstance(body, ChatRequest):
        chat = ChatForm(body.model, service.tokenizer)
        return await service.chat_jobs(body, chat, holder), chat
    form = TextForm(body.model, service.tokenizer)
    if isinstance(body, CompletionRequest):
        return await service.text_jobs(body, form, holder), form
    return await service.embedding_jobs(body, form.id, holder), form


async def perform(service: Service, task: Task) -> tuple[str, str]:
    """What a worker makes of a task: `completed` and the answer, or `failed` and the error, as JSON."""
    for wait in (*BUSY_SECONDS, None):
        try:
            return "completed", json.dumps(await _whole(service, task), ensure_ascii=False)
        except ApiError as error:
            if wait is None or error.code not in ("overloaded", "unavailable"):
                return "failed", json.dumps(error.body())
        await asyncio.sleep(wait)
    raise AssertionError("the last attempt returns")


async def _whole(service: Service, task: Task) -> dict[str, Any]:
    body = BODIES[task.endpoint].model_validate_json(task.body)
    jobs, form = await _jobs(service, body, task.holder)
    answers = await service.whole(jobs)
    if isinstance(body, EmbeddingRequest):
        return embeddings_object(body.model, answers, service.usage_tokens(jobs), body.encoding_format)
    return form.whole(answers, service.usage_tokens(jobs))
