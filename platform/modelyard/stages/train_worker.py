"""What runs on a Ray Train worker: the program on this worker's copy of the inputs, a look-out, and system metrics."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from modelyard.errors import ModelyardError
from modelyard.stages.mailbox import Outbox
from modelyard.storage import Artifact, download, is_remote
from modelyard.train.hooks import Hooks

if TYPE_CHECKING:
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import Say, Sink
    from modelyard.train.world import World

Place = tuple[Artifact, str] | tuple[Artifact, tuple[str, ...]] | str
"""An artifact with a path inside it, an artifact of which only these paths are needed, or the URI of a folder."""

_LOOK_SECONDS = 5.0
"""How often the workers ask Ray together whether a machine is about to be taken: one barrier of a few milliseconds."""
_SYSTEM_SECONDS = 10.0
_TALKERS = 8
"""Workers that send system metrics; one of each machine would be best, the first eight say enough."""


class Program(Protocol):
    """A training program: `train.pretrain`, `train.finetune`."""

    def __call__(self, job: Any, world: World, sink: Sink, say: Say, hooks: Hooks | None) -> Outcome:
        """Trains."""
        ...


def work(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs."""
    marks = {"workers": time.time()}
    import ray.cloudpickle
    import torch

    from modelyard.train.memory import lacks_memory, out_of_memory, room
    from modelyard.train.world import current

    mailbox, world = config["mailbox"], current()
    wait = ray.get(mailbox.enter.remote(_group(world), config["backoff"]))
    if wait is None:
        # An earlier try met an error that a restart does not mend: end at once, the driver raises it.
        return
    time.sleep(wait)
    torch.set_num_threads(config["threads"])
    outbox, assignment = Outbox(mailbox), ray.cloudpickle.loads(config["assignment"])
    try:
        job = assignment.job.model_copy(update={name: bring(p) for name, p in assignment.places.items()})
        hooks = SpotWatch(outbox.say, world.leads) if config["spot"] else None
        if world.leads:
            outbox.send("peak", matmul_rate(world.device) * world.size)
        program = load_program(assignment.program)
        if world.leads:
            outbox.send("marks", marks | {"imports": time.time()})
        with _system_metrics(outbox, world):
            outcome = program(job, world, outbox.metrics, outbox.say, hooks)
    except ModelyardError as error:
        cause = error.__cause__
        if cause is not None and lacks_memory(cause):
            error = out_of_memory(str(cause).splitlines()[0], room(world.device), config["predicted"])
        outbox.send("error", error, wait=True)
        raise error from None
    if world.leads:
        outbox.send("outcome", outcome, wait=True)


def _group(world: World) -> str:
    """A name all workers of this worker group share and no other group has."""
    import uuid

    return str(world.gather(uuid.uuid4().hex)[0])


def load_program(path: str) -> Program:
    """The function that `module:name` names."""
    from importlib import import_module

    module, name = path.split(":")
    program: Program = getattr(import_module(module), name)
    return program


def bring(place: Place | Mapping[str, Place]) -> str | dict[str, str]:
    """The local path of an input on this machine, copied here first where it is remote; or of several by name."""
    if isinstance(place, Mapping):
        return {name: _bring_one(each) for name, each in place.items()}
    return _bring_one(place)


def _bring_one(place: Place) -> str:
    if not isinstance(place, str):
        artifact, inside = place
        if isinstance(inside, tuple):
            brought = [artifact.local(part) for part in inside]
            return str(brought[0].parent)
        return str(artifact.local(inside) if inside else artifact.local())
    if not is_remote(place):
        return place
    import tempfile

    return str(download(place, tempfile.mkdtemp(prefix="modelyard-input-")))


class SpotWatch(Hooks):
    """Asks for a checkpoint when a machine of the run is about to be taken away (`ray.train.get_preemption_info`)."""

    def __init__(self, say: Callable[[str], None], leads: bool) -> None:
        self._say, self._leads, self._last, self._known = say, leads, 0.0, frozenset[str]()

    def asks(self) -> bool:
        if not self._leads or time.monotonic() - self._last < _LOOK_SECONDS:
            return False
        self._last = time.monotonic()
        return True

    def answer(self) -> bool:
        import ray.train

        info = ray.train.get_preemption_info()
        taken = frozenset(info.preempted_node_ids) if info is not None else frozenset()
        if not taken - self._known:
            return False
        self._known |= taken
        if self._leads:
            ranks = ", ".join(map(str, info.preempted_ranks))
            self._say(f"the machine of workers {ranks} is about to be taken away: writing a checkpoint now")
        return True


@contextmanager
def _system_metrics(outbox: Outbox, world: World) -> Iterator[None]:
    """Sends what this process and its machine use, every ten seconds, from the first workers."""
    stop = threading.Event()

    def keep_sending() -> None:
        while not stop.wait(_SYSTEM_SECONDS):
            outbox.send("system", (world.rank, usage(world.device)))

    thread = threading.Thread(target=keep_sending, name="system-metrics", daemon=True)
    if world.rank < _TALKERS:
        thread.start()
    try:
        yield
    finally:
        stop.set()


def usage(device: Any) -> dict[str, float]:
    """CPU (100 = one core) and resident memory of this process, and of its GPU where it has one."""
    import psutil
    import torch

    process = _process()
    found = {
        "system_cpu_percent": process.cpu_percent(),
        "system_rss_mib": process.memory_info().rss / 2**20,
        "system_machine_memory_percent": psutil.virtual_memory().percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found["system_gpu_memory_mib"] = (total - free) / 2**20
        found["system_gpu_allocated_mib"] = torch.cuda.memory_allocated(device) / 2**20
    return found


@cache
def _process() -> Any:
    """This process: one object for all calls, because `cpu_percent` measures since the last one."""
    import psutil

    return psutil.Process()


def matmul_rate(device: Any, seconds: float = 0.3) -> float:
    """FLOP/s of a large matrix product on this worker, as a measured peak: fp32 on a CPU, bf16 on CUDA.

    The best round of so many seconds: on a busy machine the mean is no peak, and a few milliseconds may all be slow.
    """
    import torch

    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (512, torch.float32)
    a = torch.ones(n, n, device=device, dtype=dtype)

    def product() -> float:
        began = time.perf_counter()
        a @ a
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - began

    product()
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        best = min(best, product())
    return 2 * n**3 / best
