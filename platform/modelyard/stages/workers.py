"""Ray Train around the training loop: starts workers, restarts them after failures, brings their metrics here.

`ray.train.report` is not used: its queue holds one item and is drained once a health check, which would cap training
at one step in two seconds. Metrics go through a small actor instead, the mailbox: rank 0 pushes and never waits, the
driver drains twice a second. Checkpoints are the loop's own, under the stage's scratch folder, so that a killed
worker, a killed driver and a changed number of workers all resume in the same way.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from modelyard.errors import ModelyardError, ResourceError, StageError
from modelyard.recipe.schema import Options, Resources
from modelyard.stages.base import StageContext
from modelyard.storage import Artifact, arrow_filesystem, download, is_remote, join

if TYPE_CHECKING:
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import Say, Sink, StepMetrics
    from modelyard.train.world import World

DRAIN_SECONDS = 0.5
"""How often the driver empties the mailbox, and how often rank 0 fills it at most."""


class Program(Protocol):
    """A training program: `train.pretrain`, `train.finetune`."""

    def __call__(self, job: Any, world: World, sink: Sink, say: Say) -> Outcome:
        """Trains."""
        ...


@dataclass(frozen=True)
class Assignment:
    """What every worker does: the program by import path, its job, and inputs to bring to the worker's disk.

    `places` maps a field of the job to what it should hold the local path of: an artifact with a path inside
    it, or the URI of a folder.
    """

    program: str
    job: Options
    places: Mapping[str, tuple[Artifact, str] | str] = field(default_factory=dict)


class Mailbox:
    """Messages from the workers to the driver, in order. Runs as a Ray actor without a CPU of its own."""

    def __init__(self) -> None:
        self._items: list[tuple[str, Any]] = []
        self._fatal = False

    def push(self, items: list[tuple[str, Any]]) -> None:
        """Takes messages in."""
        self._fatal |= any(kind == "error" for kind, _ in items)
        self._items += items

    def drain(self) -> list[tuple[str, Any]]:
        """Hands all messages out and forgets them."""
        items, self._items = self._items, []
        return items

    def fatal(self) -> bool:
        """Whether an error came in that no restart mends."""
        return self._fatal


class Outbox:
    """A worker's end: collects messages and pushes them without waiting, at most twice a second."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox, self._items, self._last = mailbox, list[tuple[str, Any]](), 0.0

    def metrics(self, metrics: StepMetrics) -> None:
        """Sends one step's metrics."""
        self.send("metrics", metrics)

    def say(self, text: str) -> None:
        """Sends a line for people."""
        self.send("say", text)

    def send(self, kind: str, value: Any, wait: bool = False) -> None:
        """Sends anything picklable; with `wait` returns when it has arrived."""
        import ray

        self._items.append((kind, value))
        if not wait and time.monotonic() - self._last < DRAIN_SECONDS:
            return
        items, self._items, self._last = self._items, [], time.monotonic()
        arrived = self._mailbox.push.remote(items)
        if wait:
            ray.get(arrived)


def work(config: dict[str, Any]) -> None:
    """What a Ray Train worker runs: the program on this worker's copy of the inputs."""
    import ray
    import torch

    from modelyard.train.world import current

    mailbox, assignment = config["mailbox"], config["assignment"]
    if ray.get(mailbox.fatal.remote()):
        # An earlier try met an error that a restart does not mend: end at once, the driver raises it.
        return
    torch.set_num_threads(config["threads"])
    outbox = Outbox(mailbox)
    try:
        job = assignment.job.model_copy(update={name: _bring(p) for name, p in assignment.places.items()})
        outcome = load_program(assignment.program)(job, current(), outbox.metrics, outbox.say)
    except ModelyardError as error:
        outbox.send("error", error, wait=True)
        raise
    if current().leads:
        outbox.send("outcome", outcome, wait=True)


def load_program(path: str) -> Program:
    """The function that `module:name` names."""
    from importlib import import_module

    module, name = path.split(":")
    program: Program = getattr(import_module(module), name)
    return program


def _bring(place: tuple[Artifact, str] | str) -> str:
    """The local path of an input on this machine, copied here first where it is remote."""
    if not isinstance(place, str):
        artifact, inside = place
        return str(artifact.local(inside) if inside else artifact.local())
    if not is_remote(place):
        return place
    import tempfile

    return str(download(place, tempfile.mkdtemp(prefix="modelyard-input-")))


def run_workers(ctx: StageContext[Any], assignment: Assignment, steps: int, restarts: int) -> Outcome:
    """Runs a program on `ctx.options.resources` and returns what rank 0 returned.

    Metrics appear on the progress bar and in the stage's run while it works.

    Raises:
        ModelyardError: what the program raised on purpose.
        ResourceError: the cluster has not the CPUs or GPUs asked for.
        StageError: workers failed more often than `restarts`.
    """
    import ray
    from ray.train import FailureConfig, RunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources: Resources = ctx.options.resources
    expect_room(resources)
    _settle_environment()
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    filesystem, path = arrow_filesystem(join(ctx.work, "ray-train"))
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "mailbox": mailbox,
            "assignment": assignment,
            "threads": max(1, int(resources.cpus_per_worker)),
        },
        torch_config=TorchConfig(backend="nccl" if resources.gpus_per_worker else "gloo"),
        scaling_config=_scaling(resources),
        run_config=RunConfig(
            name=ctx.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=restarts),
        ),
    )
    with _drained(ctx, mailbox, steps) as post:
        failure = _fit(trainer)
    if post.error is not None:
        raise post.error
    if failure is not None or post.outcome is None:
        raise StageError(
            f"training workers failed: {_last_line(failure)}",
            place=f"stage {ctx.name}",
            mend="run the same command again: it resumes from the last checkpoint",
        ) from failure
    return post.outcome


def expect_room(resources: Resources) -> None:
    """Raises ResourceError when this machine's Ray cannot place the workers; a cluster at an address may grow."""
    import ray

    if "RAY_ADDRESS" in os.environ:
        return
    have = ray.cluster_resources()
    wanted = {
        "CPU": resources.workers * resources.cpus_per_worker,
        "GPU": resources.workers * resources.gpus_per_worker,
    }
    for name, amount in wanted.items():
        if amount > have.get(name, 0.0):
            raise ResourceError(
                f"{resources.workers} workers need {amount:g} {name}, the cluster has {have.get(name, 0.0):g}",
                place="resources",
                mend=f"lower resources.workers or {name.lower()}s_per_worker, or use a larger cluster",
            )


def _settle_environment() -> None:
    """Ray Train settings the controller reads from the driver's environment, unless a person has set them."""
    # A finished or dead worker is noticed in half a second instead of two; a poll costs about 2 ms.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if "RAY_ADDRESS" not in os.environ:
        # No cloud takes this machine back: saves an actor of 110 MB.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def _scaling(resources: Resources) -> Any:
    from ray.train import ScalingConfig

    each: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        each["GPU"] = resources.gpus_per_worker
    return ScalingConfig(
        num_workers=resources.workers, use_gpu=bool(resources.gpus_per_worker), resources_per_worker=each
    )


def _fit(trainer: Any) -> Exception | None:
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    return None


def _last_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() if error is not None else []
    return lines[-1] if lines else "they ended without a result"


@dataclass
class _Post:
    """What came through the mailbox and matters after the run."""

    outcome: Outcome | None = None
    error: ModelyardError | None = None


@contextmanager
def _drained(ctx: StageContext[Any], mailbox: Any, steps: int) -> Iterator[_Post]:
    """Empties the mailbox in a thread while the body runs, and once more at its end."""
    import ray

    post, stop = _Post(), threading.Event()
    with ctx.progress.task("train", steps, "steps") as bar:
        handle = _handler(ctx, bar, post)

        def drain() -> None:
            for kind, value in ray.get(mailbox.drain.remote()):
                handle(kind, value)

        def keep_draining() -> None:
            while not stop.wait(DRAIN_SECONDS):
                drain()

        thread = threading.Thread(target=keep_draining, name=f"metrics-{ctx.name}", daemon=True)
        thread.start()
        try:
            yield post
        finally:
            stop.set()
            thread.join()
            drain()
            ray.kill(mailbox)


def _handler(ctx: StageContext[Any], bar: Any, post: _Post) -> Callable[[str, Any], None]:
    logged: set[int] = set()
    done = 0

    def handle(kind: str, value: Any) -> None:
        nonlocal done
        if kind == "metrics":
            ctx.run.log_metrics(value.series(), step=value.step)
            logged.add(value.step)
            bar.advance(max(0, value.step - done), loss=value.loss, **_shown(value))
            done = max(done, value.step)
        elif kind == "say":
            ctx.progress.say(value)
        elif kind == "error":
            post.error = value
        elif kind == "outcome":
            post.outcome = value
            _log_lost(ctx, value.history, logged)

    return handle


def _log_lost(ctx: StageContext[Any], history: Sequence[Mapping[str, float]], logged: set[int]) -> None:
    """Logs steps whose metrics died with a worker: a killed worker may take half a second of them along."""
    first = min(logged, default=0)
    for row in history:
        step = int(row["step"])
        if step > first and step not in logged:
            ctx.run.log_metrics({name: value for name, value in row.items() if name != "step"}, step=step)


def _shown(metrics: StepMetrics) -> dict[str, Any]:
    left = time.strftime("%M:%S", time.gmtime(metrics.eta)) if metrics.eta < 3600 else f"{metrics.eta / 3600:.1f} h"
    shown: dict[str, Any] = {"tokens/s": f"{metrics.tokens_per_second:,.0f}", "left": left}
    if "heldout_loss" in metrics.extra:
        shown["heldout"] = metrics.extra["heldout_loss"]
    return shown
