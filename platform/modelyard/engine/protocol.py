"""The interface every engine has, ours or another's."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from modelyard.engine.request import EngineStats, Request, StepOutput

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Engine(Protocol):
    """Continues many prompts at once."""

    @property
    def vocabulary(self) -> int:
        """Number of token ids."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens a prompt and its answer may have together."""
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

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replaces tensors by their Hugging Face names between two steps.

        Running requests keep their tokens and go on under the new weights; their cached keys and values
        are computed again. Raises DataError for an unknown name or another shape.
        """
        ...

    def close(self) -> None:
        """Stops the engine; requests still running end with finish `abort`."""
        ...
