"""Outputs of one request on their way to one reader."""

from __future__ import annotations

import asyncio

from modelyard.engine.request import StepOutput


class Mailbox:
    """Outputs of one request for one reader in the same event loop.

    What piles up is merged, so a slow reader gets fewer, larger ones. `complete` once the last one has been put.
    """

    def __init__(self) -> None:
        self._awaited: asyncio.Future[None] | None = None
        self._merged: StepOutput | None = None
        self._failure: BaseException | None = None
        self.complete = False

    def put(self, output: StepOutput) -> None:
        """Adds an output."""
        self._merged = output if self._merged is None else self._merged + output
        self.complete = output.finish is not None
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing comes any more: once what is here has been read, the reader gets `error`."""
        self._failure = error
        self._wake()

    def _wake(self) -> None:
        if self._awaited is not None and not self._awaited.done():
            self._awaited.set_result(None)

    async def get(self) -> StepOutput:
        """What has come since the last call; waits for it. Raises what `fail` was given."""
        while self._merged is None:
            if self._failure is not None:
                raise self._failure
            # A bare future: asyncio.Event keeps a queue of those who wait, at twice the cost.
            self._awaited = asyncio.get_running_loop().create_future()
            await self._awaited
        output, self._merged = self._merged, None
        return output
