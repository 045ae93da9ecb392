"""Engine replicas of Ray Serve, and how the ingress asks them.

A replica sends one message a step to each ingress, for all of its requests (`wire`). One that dies before a request's
first token costs nothing but time: the ingress asks another.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from grpc import RpcError
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from modelyard.engine.mailbox import Mailbox
from modelyard.engine.request import EngineStats, Request, StepOutput
from modelyard.serving import scaling
from modelyard.serving.errors import overloaded, unavailable
from modelyard.serving.folders import local_folder
from modelyard.serving.shelf import Shelf
from modelyard.serving.wire import Address, Exchange, Receiver, Sender, WireLost

log = logging.getLogger(__name__)

ATTEMPTS = 4
"""Replicas asked in turn until one sends a first token."""

LOST = (RayActorError, DeploymentUnavailableError, RpcError, RuntimeError, WireLost)
"""How a replica that is gone or going shows. Serve says RuntimeError when it does not know if a replica took a call."""

STATS_SECONDS = 4.0
"""How long replicas may take to say how they are: who reads `/metrics` waits for that, Prometheus 10 s for the page."""

LATE_SECONDS = 5.0
"""How much later than the end of its call an answer's last outputs may come over the wire."""


class EngineReplica:
    """One engine behind a deployment handle."""

    def __init__(
        self,
        model: str,
        options: Mapping[str, Any],
        adapters: Mapping[str, str] | None = None,
        most: int = 8,
        *,
        warm: bool = True,
    ) -> None:
        from modelyard.engine.choose import start
        from modelyard.engine.options import EngineOptions
        from modelyard.serving.warm import warm_up

        chosen = EngineOptions.model_validate(options)
        self._engine = start(local_folder(model, weights=True), chosen)
        if warm:
            log.warning("warmed up in %.1f s", warm_up(self._engine, chosen))
        self._shelf = Shelf(self._engine, adapters or {}, most, lambda place: local_folder(place, weights=True))
        self._name = serve.get_replica_context().replica_id.unique_id
        self._exchange = Exchange()
        self._address: asyncio.Task[Address | None] | None = None

    async def stream(
        self, request: Request, caller: str = "", call: int = 0
    ) -> AsyncGenerator[StepOutput | Address, None]:
        """Outputs of one request, unless they go over the caller's wire; what piles up meanwhile comes as one.

        Without a wire to the caller the first thing is where to open one. `call` is the caller's number of this call.
        """
        box, over = Mailbox(), False
        carrier: Sender | Mailbox | None = None

        def put(output: StepOutput) -> None:
            nonlocal carrier
            if carrier is None:  # all outputs of a request take one way, or they might overtake each other
                carrier = self._exchange.to(caller) or box
            if isinstance(carrier, Sender):
                carrier.put(call, output, box)
            else:
                box.put(output)

        async with self._shelf.lent(request.adapter):
            if caller and self._exchange.to(caller) is None and (address := await self._listening()) is not None:
                yield address
            await self._engine.start(request, put)
            try:
                while not over:
                    output = await box.get()
                    over = output.finish is not None
                    if carrier is box:
                        yield output
            finally:
                if isinstance(carrier, Sender):
                    carrier.drop(call)
                if not over:
                    self._engine.abort(request.id)

    async def _listening(self) -> Address | None:
        """Where this replica listens for wires, from the first question on; None if it cannot."""
        if self._address is None:  # a task: many may ask before the socket is there
            self._address = asyncio.create_task(self._listen())
        return await asyncio.shield(self._address)

    async def _listen(self) -> Address | None:
        try:
            return await self._exchange.open(self._name, get_node_ip_address())
        except OSError as error:
            log.warning("no wires, outputs come one by one: %s", error)
            return None

    async def __del__(self) -> None:
        """Serve's hook at a graceful stop, when no request is left."""
        self._exchange.close()
        await asyncio.to_thread(self._engine.close)

    async def stats(self) -> EngineStats:
        """The engine's statistics."""
        return self._engine.stats()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what the autoscaling policy sees of this replica."""
        stats = self._engine.stats()
        slots = stats.running / max(1, stats.slots)
        blocks = stats.blocks_used / max(1, stats.blocks)
        return {scaling.KV_USED: max(slots, blocks), scaling.WAITING_TOKENS: float(stats.waiting_tokens)}

    async def invariants(self) -> list[str]:
        """What is wrong with the engine's bookkeeping; empty when nothing is."""
        return self._engine.invariants()

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        if not self._engine.alive:
            raise RuntimeError("the engine has ended")


class ServeBackend:
    """Engine replicas behind a deployment handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        # By Serve's default calls are pickled by cloudpickle: slower, and for functions, of which there are none here.
        self._handle = handle.options(
            method_name="stream", stream=True, request_serialization="pickle", response_serialization="pickle"
        )
        self._all, self._caller = handle, uuid.uuid4().hex
        self._receiver = Receiver(self._caller)
        self._followers: set[asyncio.Task[None]] = set()

    async def stream(self, request: Request) -> AsyncGenerator[StepOutput, None]:
        """See `Backend.stream`. Before the first token another replica takes over from one that died."""
        for attempt in range(ATTEMPTS):
            started = over = False
            call, box = self._receiver.expect()
            responses: Any = self._handle.remote(request, self._caller, call)
            follower = asyncio.create_task(self._follow(responses, call, box))
            self._followers.add(follower)
            follower.add_done_callback(self._followers.discard)
            try:
                while not over:
                    output = await box.get()
                    started, over = True, output.finish is not None
                    yield output
                return
            except BackPressureError:
                over = True
                raise overloaded() from None
            except LOST as error:
                over = not isinstance(error, WireLost)
                log.warning("replica lost at attempt %d, answer begun: %s", attempt + 1, started)
                if started or attempt + 1 == ATTEMPTS:
                    raise unavailable("the replica was lost; try again") from error
            finally:
                self._receiver.forget(call)
                if not over:  # cancelling a call that failed raises its error once more
                    follower.cancel()
                    responses.cancel()

    async def _follow(self, responses: Any, call: int, box: Mailbox) -> None:
        """Reads a request's own call to its end: outputs that no wire carries, errors, and where to open a wire."""
        speaker = "unnamed"
        try:
            async for message in responses:
                if isinstance(message, Address):
                    speaker = message.replica
                    self._receiver.connect(message)
                    again = self._receiver.elsewhere(call, speaker)
                elif not (again := not self._receiver.claim(call, speaker)):
                    box.put(message)
                if again:  # Serve lost the replica that had begun and asks another one
                    box.fail(WireLost())
                    return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            box.fail(WireLost())  # the replica gave the call up
        except Exception as error:  # handed to who waits for the answer, whatever it is
            # Serve takes a call that brings no message and is over before it looked for an error, though it says OK.
            if not (isinstance(error, RuntimeError) and "StatusCode.OK" in str(error)):
                box.fail(error)
                return
        if not box.complete:  # the wire may be slower than the call
            asyncio.get_running_loop().call_later(LATE_SECONDS, box.fail, WireLost())

    async def stats(self) -> list[EngineStats]:
        """See `Backend.stats`."""
        try:
            said = await self._all.broadcast("stats").results_async(timeout_s=STATS_SECONDS, return_exceptions=True)
        except DeploymentUnavailableError:
            return []
        except LOST as error:
            raise TimeoutError("a replica was lost as it was asked") from error
        # One that is going says so by an error, and is no longer there to count.
        return [stats for stats in said if isinstance(stats, EngineStats)]
