"""Answering, scoring and embedding of many prompts as requests that an engine starts."""

from __future__ import annotations

import asyncio
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Sequence

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.protocol import Put
from modelyard.engine.request import Pooling, Request, Scored, StepOutput
from modelyard.errors import StageError

Submit = Callable[[Request], AsyncGenerator[StepOutput, None]]

AT_ONCE = 256
"""Requests of one call in the engine's queue at a time."""


class Streams(ABC):
    """What of `protocol.Engine` follows from starting and aborting a request."""

    @abstractmethod
    async def start(self, request: Request, put: Put) -> None:
        """See `protocol.Engine.start`."""

    @abstractmethod
    def abort(self, request_id: str) -> None:
        """See `protocol.Engine.abort`."""

    async def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `protocol.Engine.submit`."""
        box, finished = Mailbox(), False
        await self.start(request, box.put)
        try:
            while not finished:
                output = await box.get()
                finished = output.finish is not None
                yield output
        finally:
            if not finished:
                self.abort(request.id)

    async def score(
        self, prompts: Sequence[Sequence[int]], *, start: int = 1, adapter: str | None = None, priority: int = 0
    ) -> list[Scored]:
        """See `protocol.Engine.score`."""
        return await _score_all(self.submit, prompts, start, adapter, priority)

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        adapter: str | None = None,
        priority: int = 0,
    ) -> list[tuple[float, ...]]:
        """See `protocol.Engine.embed`."""
        return await _embed_all(self.submit, prompts, pooling, adapter, priority)


async def _score_all(
    submit: Submit, prompts: Sequence[Sequence[int]], start: int, adapter: str | None, priority: int
) -> list[Scored]:
    """See `protocol.Engine.score`. Raises StageError when a prompt was aborted or failed."""
    requests = [
        Request(
            f"score-{uuid.uuid4().hex}",
            tuple(prompt),
            priority=priority,
            detokenize=False,
            adapter=adapter,
            task="score",
            prompt_logprobs=0,
            logprobs_from=start,
        )
        for prompt in prompts
    ]
    outputs = await _all(submit, requests)
    return [Scored(tuple(t.logprob for t in o.prompt_logprobs), o.weights) for o in outputs]


async def _embed_all(
    submit: Submit, prompts: Sequence[Sequence[int]], pooling: Pooling, adapter: str | None, priority: int
) -> list[tuple[float, ...]]:
    """See `protocol.Engine.embed`. Raises StageError when a prompt was aborted or failed."""
    requests = [
        Request(
            f"embed-{uuid.uuid4().hex}",
            tuple(prompt),
            priority=priority,
            detokenize=False,
            adapter=adapter,
            task="embed",
            pooling=pooling,
        )
        for prompt in prompts
    ]
    return [o.embedding for o in await _all(submit, requests)]


async def _all(submit: Submit, requests: list[Request]) -> list[StepOutput]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(request: Request) -> StepOutput:
        async with gate:
            total = StepOutput(())
            async for output in submit(request):
                total = total + output
        if total.finish != "stop":
            raise StageError(f"a prompt ended with {total.finish}: {total.error}", place="engine", mend="try again")
        return total

    return list(await asyncio.gather(*(one(r) for r in requests)))
