"""Outputs of one request on their way to one reader."""

from __future__ import annotations

import asyncio

from modelyard.engine.request import StepOutput


class Mailbox:
    """Outputs of one request for one reader in the same event loop.

    What piles up is merged, so a slow reader gets fewer, larger ones. `complete` once the last one has been put.
    """

    def __init__(self) -> None:
        self._ready = asyncio.Event()
        self._merged: StepOutput | None = None
        self._failure: BaseException | None = None
        self.complete = False

    def put(self, output: StepOutput) -> None:
        """Adds an output."""
        self._merged = output if self._merged is None else self._merged + output
        self.complete = output.finish is not None
        self._ready.set()

    def fail(self, error: BaseException) -> None:
        """Nothing comes any more: once what is here has been read, the reader gets `error`."""
        self._failure = error
        self._ready.set()

    async def get(self) -> StepOutput:
        """What has come since the last call; waits for it. Raises what `fail` was given."""
        await self._ready.wait()
        output, self._merged = self._merged, None
        if output is None:
            assert self._failure is not None, "the event is set only after an output or an error is stored"
            raise self._failure
        if self._failure is None:
            self._ready.clear()
        return output
