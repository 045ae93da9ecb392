"""From a validated request body to answers: prompts to tokens, jobs to the backend, outputs to JSON or events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import reduce
from importlib.util import find_spec
from operator import add

from modelyard.engine.request import UNSATISFIED, EngineStopped, Request, Sampling, StepOutput
from modelyard.engine.tokenizer import Tokenizer
from modelyard.errors import DataError, ResourceError
from modelyard.serving.answers import Form, event
from modelyard.serving.backend import Backend
from modelyard.serving.cache import Cache, cache_key, deterministic, dump, parse
from modelyard.serving.deadline import Deadline
from modelyard.serving.errors import ApiError, overloaded, unavailable
from modelyard.serving.limits import Limiter
from modelyard.serving.metrics import Metrics
from modelyard.serving.schema import ChatRequest, CompletionRequest, EmbeddingRequest

ATTEMPTS = 3
"""Times a whole answer is begun when the replica that computes it is lost."""

LONG_TEXT = 20_000
"""Characters from which tokenization leaves the event loop: about 5 ms of work."""


@dataclass(frozen=True)
class Job:
    """One choice of a response."""

    index: int
    request: Request
    key: str | None = None
    """Under what the answer is cached; None = it is not."""


class Service:
    """One served model.

    Args:
        name: its name in the API.
        tokenizer: its tokenizer and chat template.
        backend: what continues prompts.
        max_length: tokens of prompt and answer together.
        max_choices: answers one request may ask for.
        timeout: seconds for one request.
        metrics: where to count.
        cache: keeps deterministic answers; None = none.
        share: whether an answer is given to other holders of keys.
        limiter: what each holder may use; None = no limits.
        version: of the model, for the cache, headers and feedback.
        adapters: names of LoRA adapters requests may ask for in place of the model.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        backend: Backend,
        *,
        max_length: int,
        max_choices: int,
        timeout: float,
        metrics: Metrics,
        cache: Cache | None = None,
        share: bool = False,
        limiter: Limiter | None = None,
        version: str = "",
        adapters: Sequence[str] = (),
    ) -> None:
        self.name, self.tokenizer, self.backend = name, tokenizer, backend
        self.max_length, self.max_choices, self.timeout = max_length, max_choices, timeout
        self.metrics = metrics
        self.cache, self._share, self.limiter, self.version = cache, share, limiter, version
        self.adapters = tuple(adapters)

    def check_model(self, name: str) -> str | None:
        """The adapter a model's name means, written `adapter` or `model:adapter`; None for the model itself.

        Raises a 404 ApiError for another model's name.
        """
        if name == self.name:
            return None
        adapter = name.removeprefix(f"{self.name}:")
        if adapter not in self.adapters:
            message = f"the model {name[:100]!r} does not exist; /v1/models lists what this server has: {self.name!r}"
            message += f" and {len(self.adapters)} adapters" if self.adapters else ""
            raise ApiError(404, message, param="model", code="model_not_found")
        return adapter

    async def chat_jobs(self, body: ChatRequest, form: Form, holder: str = "") -> list[Job]:
        """The choices of a chat request of a key's holder.

        Raises ApiError for another model's name, when the prompt cannot be made or is too long, or when the holder
        has used up its limit.
        """
        adapter = self.check_model(body.model)
        try:
            turns = body.turns()
        except ValueError as error:
            raise ApiError(400, str(error), param="messages") from None
        text = self._render(turns, body)
        return self._jobs([await self._encode(text, special=False)], body, form, "messages", holder, adapter)

    def _render(self, turns: list[dict[str, object]], body: ChatRequest) -> str:
        try:
            return self.tokenizer.render(turns, body.offered())
        except DataError as error:
            raise ApiError(400, error.what, param=error.place) from None

    async def text_jobs(self, body: CompletionRequest, form: Form, holder: str = "") -> list[Job]:
        """The choices of a text completion request, prompt by prompt. Raises ApiError as above."""
        adapter = self.check_model(body.model)
        prompts = [p if isinstance(p, list) else await self._encode(p, special=True) for p in body.prompts()]
        return self._jobs(prompts, body, form, "prompt", holder, adapter)

    async def _encode(self, text: str, *, special: bool) -> list[int]:
        try:
            if len(text) < LONG_TEXT:
                return self.tokenizer.encode(text, special=special)
            return await asyncio.to_thread(self.tokenizer.encode, text, special=special)
        except DataError as error:
            raise ApiError(400, error.what) from None

    def _jobs(
        self, prompts: Sequence[list[int]], body: ChatRequest | CompletionRequest, form: Form, field: str, holder: str,
        adapter: str | None,
    ) -> list[Job]:  # fmt: skip
        if len(prompts) * body.n > self.max_choices:
            raise ApiError(400, f"at most {self.max_choices} answers a request", param="n")
        jobs: list[Job] = []
        priority = self.priority(body.priority, holder)
        for tokens in prompts:
            sampling = body.sampling(self._room(tokens, field))
            self._check(sampling)
            prompt = tuple(tokens)
            for copy in range(body.n):
                name, chosen = f"{form.id}-{len(jobs)}", _seeded(sampling, copy)
                request = Request(name, prompt, chosen, priority, adapter=adapter)
                jobs.append(Job(len(jobs), request, self._key(request, holder)))
        return self._admitted(jobs, holder)

    async def embedding_jobs(self, body: EmbeddingRequest, name: str, holder: str = "") -> list[Job]:
        """One job an input. Raises ApiError as above."""
        adapter = self.check_model(body.model)
        inputs = [p if isinstance(p, list) else await self._encode(p, special=True) for p in body.inputs()]
        jobs, priority = [], self.priority(body.priority, holder)
        for i, tokens in enumerate(inputs):
            self._room(tokens, "input")
            request = Request(
                f"{name}-{i}", tuple(tokens), priority=priority, detokenize=False, adapter=adapter, task="embed",
                pooling=body.pooling,
            )  # fmt: skip
            jobs.append(Job(i, request))
        return self._admitted(jobs, holder)

    def priority(self, wanted: int, holder: str) -> int:
        """The priority a holder's request gets. Raises ApiError when it may not have it."""
        return wanted if self.limiter is None else self.limiter.priority(holder, wanted)

    def _admitted(self, jobs: list[Job], holder: str) -> list[Job]:
        """The jobs, taken from what their holder may use. Raises ApiError when that is used up."""
        if self.limiter is not None:
            self.limiter.admit(holder, _prompt_tokens(jobs))
        return jobs

    def _key(self, request: Request, holder: str) -> str | None:
        if self.cache is None or not deterministic(request):
            return None
        return cache_key(f"{self.name}@{self.version}", "" if self._share else holder, request)

    def _room(self, tokens: list[int], field: str) -> int:
        """Tokens left for the answer."""
        if not tokens:
            raise ApiError(400, "the prompt is empty", param=field)
        room = self.max_length - len(tokens)
        if room < 1:
            message = f"the prompt has {len(tokens):,} tokens; the model takes {self.max_length:,} with the answer"
            raise ApiError(400, message, param=field, code="context_length_exceeded")
        if max(tokens) >= self.tokenizer.vocabulary:
            raise ApiError(400, f"token ids must be below {self.tokenizer.vocabulary}", param=field)
        return room

    def _check(self, sampling: Sampling) -> None:
        try:
            sampling.check(self.tokenizer.vocabulary)
        except DataError as error:
            raise ApiError(400, error.mend, param=error.place) from None
        if sampling.grammar is not None and find_spec("llguidance") is None:
            message = "this server cannot constrain answers: the grammar extra is not installed"
            raise ApiError(400, message, param="response_format")

    async def outputs(self, job: Job) -> AsyncGenerator[StepOutput, None]:
        """Messages of one choice: one from the cache, or the engine's, which are kept once they are complete."""
        kept = await self._kept(job)
        if kept is not None:
            yield kept
            return
        parts: list[StepOutput] = []
        async with aclosing(self._computed(job)) as computed:
            async for output in computed:
                parts.append(output)
                yield output
        if self.cache is not None and job.key is not None and parts and parts[-1].finish in ("stop", "length"):
            await self.cache.put(job.key, dump(reduce(add, parts)))

    async def _kept(self, job: Job) -> StepOutput | None:
        if self.cache is None or job.key is None:
            return None
        found = await self.cache.get(job.key)
        kept = parse(found) if found is not None else None
        (self.metrics.cache_misses if kept is None else self.metrics.cache_hits).inc()
        return kept

    async def _computed(self, job: Job) -> AsyncGenerator[StepOutput, None]:
        """Messages of one choice, counted; ApiError instead of the engine's errors."""
        watch = self.metrics.watch(len(job.request.prompt))
        deadline = Deadline(self.timeout)
        try:
            async with aclosing(self.backend.stream(job.request)) as stream:
                while True:
                    # Around each message, because a stream's first is awaited in another task than the rest.
                    with deadline:
                        output = await anext(stream, None)
                    if output is None:
                        return
                    watch.saw(output)
                    _check_finish(output, job.request)
                    yield output
        except TimeoutError:
            message = f"no answer within {self.timeout:.0f} s"
            raise ApiError(504, message, kind="server_error", code="timeout") from None
        except DataError as error:
            raise ApiError(400, f"{error.what}; {error.mend}", param=_field(error.place, job.request)) from None
        except ResourceError:
            raise overloaded() from None
        except EngineStopped:
            raise unavailable("the engine has stopped; try again") from None
        finally:
            deadline.end()

    async def whole(self, jobs: list[Job]) -> list[StepOutput]:
        """Every choice's full answer. The first failure cancels the others."""

        async def once(job: Job) -> StepOutput:
            return reduce(add, [part async for part in self.outputs(job)])

        async def collect(job: Job) -> StepOutput:
            # Nothing has been sent yet, so a replica lost in the midst of an answer is nobody's concern.
            for _ in range(ATTEMPTS - 1):
                try:
                    return await once(job)
                except ApiError as error:
                    if error.code != "unavailable":
                        raise
            return await once(job)

        if len(jobs) == 1:
            return [await collect(jobs[0])]
        failure: BaseException | None = None
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(collect(job)) for job in jobs]
        except* ApiError as failed:
            # Raised here it would come out in a group again.
            failure = failed.exceptions[0]
        if failure is not None:
            raise failure
        return [task.result() for task in tasks]

    async def merged(self, jobs: list[Job]) -> AsyncGenerator[tuple[int, StepOutput], None]:
        """Messages of all choices as they come."""
        if len(jobs) == 1:
            async with aclosing(self.outputs(jobs[0])) as outputs:
                async for output in outputs:
                    yield jobs[0].index, output
            return
        queue: asyncio.Queue[tuple[int, StepOutput] | ApiError | None] = asyncio.Queue()

        async def pump(job: Job) -> None:
            try:
                async for output in self.outputs(job):
                    queue.put_nowait((job.index, output))
            except ApiError as error:
                queue.put_nowait(error)
            queue.put_nowait(None)

        tasks = [asyncio.create_task(pump(job)) for job in jobs]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, ApiError):
                    raise item
                if item is None:
                    left -= 1
                    continue
                yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def events(
        self, jobs: list[Job], form: Form, stream: AsyncIterator[tuple[int, StepOutput]], *, include_usage: bool,
        spent: Callable[[int], None] | None = None,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        """Server-sent events of a streamed response, up to `[DONE]`; a failure becomes an error event.

        `spent` is told of generated tokens as they come.
        """
        opened: set[int] = set()
        completion = 0
        try:
            async for index, output in stream:
                completion += len(output.tokens)
                if spent is not None:
                    spent(len(output.tokens))
                if index not in opened:
                    opened.add(index)
                    if (opening := form.opening(index)) is not None:
                        yield event(opening)
                if (chunk := form.chunk(index, output)) is not None:
                    yield chunk
        except ApiError as error:
            self.metrics.errors.labels(error.code or error.kind).inc()
            yield event(error.body())
        else:
            if include_usage:
                yield event(form.closing(_prompt_tokens(jobs), completion))
        yield b"data: [DONE]\n\n"

    def usage_tokens(self, jobs: list[Job]) -> int:
        """Prompt tokens to report: each prompt once."""
        return _prompt_tokens(jobs)


def _field(place: str, request: Request) -> str:
    """What an engine's parameter is called in the API."""
    grammar = request.sampling.grammar
    if place != "grammar" or grammar is None:
        return place
    return "regex" if grammar.kind == "regex" else "response_format"


def _check_finish(output: StepOutput, request: Request) -> None:
    """Raises ApiError when the engine gave the request up."""
    if output.error.startswith(UNSATISFIED):
        raise ApiError(400, output.error, param=_field("grammar", request), code="grammar")
    if output.finish == "error":
        raise ApiError(500, output.error, kind="server_error", code="engine")
    if output.finish == "abort":
        raise unavailable("the engine stopped; try again")


def _prompt_tokens(jobs: list[Job]) -> int:
    # n answers to one prompt share its token tuple, as OpenAI counts it.
    return sum(len(p) for p in {id(j.request.prompt): j.request.prompt for j in jobs}.values())


def _seeded(sampling: Sampling, copy: int) -> Sampling:
    """The n answers of a seeded request differ from each other and repeat together."""
    return sampling if sampling.seed is None or copy == 0 else replace(sampling, seed=sampling.seed + copy)
