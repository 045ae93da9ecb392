"""The HTTP application: OpenAI's routes over a service, with errors in OpenAI's shape. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from modelyard.engine.request import StepOutput
from modelyard.errors import StorageError
from modelyard.serving import background, describe
from modelyard.serving.answers import ChatForm, Form, TextForm, embeddings_object
from modelyard.serving.background import Background
from modelyard.serving.errors import ApiError, invalid_field, unavailable
from modelyard.serving.feedback import FeedbackStore
from modelyard.serving.middleware import Gate, holder_of
from modelyard.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest, FeedbackRequest
from modelyard.serving.service import Job, Service

T = TypeVar("T")
log = logging.getLogger(__name__)


def build_app(
    service: Service,
    *,
    keys: Mapping[str, str] | None,
    max_body: int,
    feedback: FeedbackStore | None = None,
    exposition: Callable[[], Awaitable[bytes]] | None = None,
    tasks: Background | None = None,
) -> FastAPI:
    """The application that serves one model.

    Args:
        service: what answers.
        keys: digests of API keys and their holders; None = no key is asked for.
        max_body: largest request body in bytes.
        feedback: keeps what people say of answers; None = the route answers 404.
        exposition: makes the page of `/metrics`; None = the service's own metrics.
        tasks: queues asynchronous requests; None = the routes answer 404.
    """
    app = FastAPI(title="modelyard", summary="OpenAI-compatible inference", docs_url=None, redoc_url=None)
    app.add_middleware(Gate, keys=keys, max_body=max_body, metrics=service.metrics)
    _handle_errors(app, service)
    _information(app, service, feedback is not None, exposition)
    _opinions(app, service, feedback)
    _embeddings(app, service)
    background.routes(app, service, tasks)
    describe.complete(app, keys=keys is not None)

    @app.post("/v1/chat/completions", response_model=None, responses=describe.answers(describe.CHAT, stream=True))
    async def chat(body: ChatRequest, request: Request) -> Response:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        form = ChatForm(body.model, service.tokenizer, include_usage=include_usage)
        jobs = await service.chat_jobs(body, form, holder_of(request))
        return await _respond(service, request, jobs, form, stream=body.stream, include_usage=include_usage)

    @app.post("/v1/completions", response_model=None, responses=describe.answers(describe.COMPLETION, stream=True))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        form = TextForm(body.model, service.tokenizer, include_usage=include_usage)
        jobs = await service.text_jobs(body, form, holder_of(request))
        return await _respond(service, request, jobs, form, stream=body.stream, include_usage=include_usage)

    return app


def _embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", response_model=None, responses=describe.answers(describe.EMBEDDINGS))
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        jobs = await service.embedding_jobs(body, f"embd-{uuid.uuid4().hex}", holder_of(request))
        answers = await _unless_disconnected(request, service.whole(jobs))
        return JSONResponse(embeddings_object(body.model, answers, service.usage_tokens(jobs), body.encoding_format))


def _opinions(app: FastAPI, service: Service, store: FeedbackStore | None) -> None:
    @app.post("/v1/feedback", response_model=None, responses=describe.answers(describe.FEEDBACK))
    async def feedback(body: FeedbackRequest, request: Request) -> JSONResponse:
        if store is None:
            raise ApiError(404, "this server keeps no feedback", code="feedback_off")
        try:
            name = await store.add(body, holder_of(request), service.version)
        except ValueError as error:  # images in a message
            raise ApiError(400, str(error), param="messages") from None
        except (OSError, StorageError):
            log.exception("feedback could not be written")
            raise unavailable("the feedback could not be kept; try again") from None
        return JSONResponse({"id": name, "object": "feedback"})


def _information(
    app: FastAPI, service: Service, feedback: bool, exposition: Callable[[], Awaitable[bytes]] | None
) -> None:
    """Routes that generate nothing."""
    created = int(time.time())
    page = (Path(__file__).parent / "static" / "chat.html").read_text(encoding="utf-8")
    card = {
        "id": service.name,
        "object": "model",
        "created": created,
        "owned_by": "modelyard",
        "max_model_len": service.max_length,
        "feedback": feedback,
    }

    def adapted(name: str) -> dict[str, Any]:
        return card | {"id": name, "root": service.name, "parent": service.name}

    @app.get("/v1/models", responses=describe.answers(describe.MODELS))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card, *(adapted(name) for name in service.adapters)]}

    @app.get("/v1/models/{name:path}", responses=describe.answers(describe.MODEL))
    async def model(name: str) -> dict[str, Any]:
        adapter = service.check_model(name)
        return card if adapter is None else adapted(adapter)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok", "model": service.name}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        if exposition is not None:
            text = await exposition()
        else:
            await service.metrics.ask(service.backend)
            text = service.metrics.render()
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> str:
        return page


def _handle_errors(app: FastAPI, service: Service) -> None:
    """Everything that goes wrong leaves in OpenAI's shape, without the request's content."""

    def respond(error: ApiError) -> JSONResponse:
        service.metrics.errors.labels(error.code or error.kind).inc()
        return JSONResponse(error.body(), error.status, error.headers())

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        sent = request.headers.get("content-type", "")
        if "json" not in sent and error.errors()[0]["loc"] == ("body",):  # curl's -d alone calls it a form
            named = f"with content-type {sent[:100]}" if sent else "without a content-type"
            return respond(ApiError(400, f"the body came {named}; send the header content-type: application/json"))
        return respond(invalid_field(error.errors()))

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        unread = error.status_code == 400  # FastAPI's word for bytes that are not UTF-8, or brackets nested too deep
        told = "the body is not JSON in UTF-8, or is nested too deep" if unread else str(error.detail)
        answer = respond(ApiError(error.status_code, told))
        answer.headers.update(error.headers or {})  # Allow, of a 405
        return answer


async def _respond(
    service: Service, request: Request, jobs: list[Job], form: Form, *, stream: bool, include_usage: bool
) -> Response:
    named = {"x-modelyard-version": service.version} if service.version else {}
    if not stream:
        answers = await _unless_disconnected(request, service.whole(jobs))
        _charge(service, request, sum(len(answer.tokens) for answer in answers))
        return JSONResponse(form.whole(answers, service.usage_tokens(jobs)), headers=named)
    # The first message is awaited before the status line is sent, so that a refusal can still be a 4xx.
    outputs = service.merged(jobs)
    first = await _unless_disconnected(request, _first(outputs))
    limiter, holder = service.limiter, holder_of(request)
    spent = None if limiter is None or not limiter.counts(holder) else partial(limiter.used, holder)
    events = service.events(jobs, form, _chain(first, outputs), include_usage=include_usage, spent=spent)
    headers = named | {"cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(events, media_type="text/event-stream", headers=headers)


def _charge(service: Service, request: Request, tokens: int) -> None:
    if service.limiter is not None:
        service.limiter.used(holder_of(request), tokens)


async def _first(outputs: AsyncGenerator[tuple[int, StepOutput], None]) -> tuple[int, StepOutput]:
    return await anext(outputs)


async def _chain(
    first: tuple[int, StepOutput], rest: AsyncGenerator[tuple[int, StepOutput], None]
) -> AsyncIterator[tuple[int, StepOutput]]:
    try:
        yield first
        async for item in rest:
            yield item
    finally:
        await rest.aclose()  # aborts what still runs


async def _unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes away first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client went away", code="client_disconnected")
        return await task
    finally:
        for future in (task, gone):
            if not future.done():
                future.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
