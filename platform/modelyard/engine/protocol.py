"""The interface every engine has, ours or another's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from modelyard.engine.options import EngineOptions
from modelyard.engine.request import EngineStats, Pooling, Request, Scored, StepOutput, Task

if TYPE_CHECKING:
    from torch import Tensor

    from modelyard.engine.tokenizer import Tokenizer

Put = Callable[[StepOutput], None]
"""Takes the outputs of one request."""


@runtime_checkable
class Engine(Protocol):
    """Continues, scores and embeds many prompts at once."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens a prompt and its answer may have together."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when its folder has none."""
        ...

    @property
    def tasks(self) -> frozenset[Task]:
        """What requests may ask for."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can still answer."""
        ...

    async def start(self, request: Request, put: Put) -> None:
        """Queues a request whose outputs go to `put`, in this event loop, the last with `finish`.

        For a reader of many requests: those that a step advanced are told one after the other. Raises as `submit`.
        """
        ...

    def submit(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """Queues a request and yields what is ready; the last output has `finish` set.

        Outputs that pile up while the reader is busy arrive merged. Leaving the iterator early aborts
        the request. Raises DataError for a request that can never run, ResourceError when too many wait,
        EngineStopped when the engine is closed or has failed.
        """
        ...

    def abort(self, request_id: str) -> None:
        """Ends a request soon, with finish `abort`. Unknown ids are ignored."""
        ...

    def stats(self) -> EngineStats:
        """A snapshot, at no cost to running requests."""
        ...

    async def score(
        self, prompts: Sequence[Sequence[int]], *, start: int = 1, adapter: str | None = None, priority: int = 0
    ) -> list[Scored]:
        """Log-probabilities of the tokens from position `start` on, for each prompt.

        What lies before `start` may come from the prefix cache, so many endings of one beginning cost little.
        Raises as `submit`.
        """
        ...

    async def embed(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        pooling: Pooling = "mean",
        adapter: str | None = None,
        priority: int = 0,
    ) -> list[tuple[float, ...]]:
        """A vector of length one for each prompt, made of the last layer's. Raises as `submit`."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces tensors by their Hugging Face names between two steps.

        Running requests keep their tokens and go on under the new weights; their cached keys and values
        are computed again. Outputs say which version chose their tokens. Raises DataError for an unknown name or
        another shape; tensors before it are replaced then, and the version stays.
        """
        ...

    def pause(self) -> None:
        """Stops computing after the step in progress; requests wait where they are and new ones queue."""
        ...

    def resume(self) -> None:
        """Goes on after `pause`."""
        ...

    def load_adapter(self, name: str, folder: str) -> None:
        """Makes a PEFT LoRA folder available to requests under `name`.

        Raises DataError for a taken name, a folder that is no LoRA adapter or holds what could execute, or an
        adapter of another base.
        """
        ...

    def unload_adapter(self, name: str) -> None:
        """Takes an adapter away from new requests; running ones keep it. Raises DataError when it is not loaded."""
        ...

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping; an empty list when nothing is."""
        ...

    def close(self) -> None:
        """Stops the engine; requests still running end with finish `abort`."""
        ...


class Stepper(Protocol):
    """An engine for one thread, which is told what each step gave when it asks for the step."""

    @property
    def options(self) -> EngineOptions:
        """What it was made with."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, None when its folder has none."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens a prompt and its answer may have together."""
        ...

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        ...

    @property
    def version(self) -> int:
        """Of the weights."""
        ...

    @property
    def paused(self) -> bool:
        """Whether steps do nothing."""
        ...

    @property
    def waiting(self) -> int:
        """Requests that no step has begun."""
        ...

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        ...

    def add(self, request: Request) -> None:
        """Queues a request. Raises as `Engine.submit`."""
        ...

    def abort(self, request_id: str) -> object:
        """Ends a request at once; no step tells of it any more. Unknown ids are ignored."""
        ...

    def step(self) -> list[tuple[str, StepOutput]]:
        """One step: what each request that it advanced gained, by its id."""
        ...

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `Engine.update_weights`."""
        ...

    def close(self) -> None:
        """Ends what it started; it can do nothing afterwards."""
        ...
