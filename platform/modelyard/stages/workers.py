"""Ray Train around the training loop: starts workers, restarts them after failures, brings their metrics here.

Metrics go through a small actor, the mailbox. Checkpoints are the loop's own, under the stage's scratch folder, so that
a killed worker, a killed driver and a changed number of workers all resume in the same way.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelyard.errors import ResourceError, StageError
from modelyard.planner.machine import free_memory
from modelyard.recipe.schema import Options, Resources
from modelyard.stages.base import StageContext
from modelyard.stages.live import Rates, drained, make_rates
from modelyard.stages.mailbox import Mailbox
from modelyard.stages.train_worker import Place, work
from modelyard.storage import arrow_filesystem, join

if TYPE_CHECKING:
    from modelyard.planner.estimate import Estimate
    from modelyard.stages.training import TrainingStageOptions
    from modelyard.train.loop import Outcome

_GROUP_START_SECONDS = 30.0
"""How long Ray Train waits for a worker group it has decided on; a smaller one may fit after a node is lost."""
RESIZE_SECONDS = 60.0
"""How often an elastic group that could grow looks whether there is room; growing starts it again."""
_KILLED_FOR_MEMORY = ("OutOfMemoryError", "low on memory", "memory monitor", "killed due to memory pressure")


@dataclass(frozen=True)
class Assignment:
    """What every worker does: the program by import path, its job, and inputs to bring to the worker's disk.

    `places` maps a field of the job to what it should hold the local path of: an artifact with a path inside
    it, or the URI of a folder; or, for a field that is a mapping, several of these by name.
    """

    program: str
    job: Options
    places: Mapping[str, Place | Mapping[str, Place]] = field(default_factory=dict)


def run_workers(
    ctx: StageContext[Any], assignment: Assignment, steps: int, estimate: Estimate | None = None
) -> Outcome:
    """Runs a program on `ctx.options.resources` and returns what rank 0 returned.

    Metrics appear on the progress bar and in the stage's run while it works.

    Args:
        ctx: of a training stage.
        assignment: what the workers do.
        steps: optimizer steps in all, for the bar.
        estimate: what the planner predicted, for the share of the peak and for errors; None = not known.

    Raises:
        ModelyardError: what the program raised on purpose.
        ResourceError: the cluster has not the CPUs or GPUs asked for, or a worker ran out of memory.
        StageError: workers failed more often than `restarts`.
    """
    import ray

    options: TrainingStageOptions = ctx.options
    began = time.time()
    _settle_environment()
    await_room(options.resources, options.workers_timeout)
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = _trainer(ctx, assignment, mailbox, estimate)
    rates = make_rates(estimate, options.resources) if estimate is not None else Rates()
    with drained(ctx, mailbox, steps, rates, began) as post:
        failure = _fit(trainer)
    if post.error is not None:
        raise post.error
    if failure is not None or post.outcome is None:
        raise _named(failure, ctx.name, estimate, post.said) from failure
    return post.outcome


def _trainer(ctx: StageContext[Any], assignment: Assignment, mailbox: Any, estimate: Estimate | None) -> Any:
    import ray.cloudpickle
    from ray.train import RunConfig
    from ray.train.torch import TorchConfig

    # `ray.train` exports the same class, but its type names that of the version before.
    from ray.train.v2.api.config import FailureConfig

    options: TrainingStageOptions = ctx.options
    filesystem, path = arrow_filesystem(join(ctx.work, "ray-train"))
    starts = math.ceil(options.workers_timeout / _GROUP_START_SECONDS)
    return _lean_trainer()(
        work,
        train_loop_config={
            "mailbox": mailbox,
            # As bytes: Ray Train's controller reads this too, and would import the program for it (4 CPU s).
            "assignment": ray.cloudpickle.dumps(assignment),
            "threads": max(1, int(options.resources.cpus_per_worker)),
            "backoff": options.restart_backoff,
            "spot": _watches_nodes(),
            "predicted": estimate.memory_bytes if estimate is not None else None,
        },
        torch_config=TorchConfig(backend="nccl" if options.resources.gpus_per_worker else "gloo"),
        scaling_config=scaling(options.resources),
        run_config=RunConfig(
            name=ctx.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=options.restarts, controller_failure_limit=starts),
        ),
    )


def _lean_trainer() -> Any:
    """Ray Train's torch trainer, without actors that have nothing to do here: each costs a process of 2 CPU s.

    There is no Ray Data set to share out; and on a Ray that ends with this process nobody needs a detached actor that
    frees placement groups of dead controllers.
    """
    # `ray.train.torch` exports the same class, but its type names that of the version before.
    from ray.train.v2.torch.torch_trainer import TorchTrainer

    idle = {"DatasetsCallback"} | (set() if "RAY_ADDRESS" in os.environ else {"PlacementGroupCleanerCallback"})

    class LeanTrainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            return [each for each in super()._create_default_callbacks() if type(each).__name__ not in idle]

    return LeanTrainer


def await_room(resources: Resources, timeout: float, beside: Mapping[str, float] | None = None) -> None:
    """Waits until the cluster has the CPUs and GPUs of the fewest workers, and of what is to run `beside` them; this
    machine's own Ray does not grow.

    Raises:
        ResourceError: it has not, after `timeout` seconds on a cluster at an address.
    """
    import ray

    fewest = resources.fewest
    more = beside or {}
    wanted = {"CPU": fewest * resources.cpus_per_worker + more.get("CPU", 0.0),
              "GPU": fewest * resources.gpus_per_worker + more.get("GPU", 0.0)}  # fmt: skip
    end = time.monotonic() + (timeout if "RAY_ADDRESS" in os.environ else 0.0)
    while True:
        have = ray.cluster_resources()
        short = [name for name, amount in wanted.items() if amount > have.get(name, 0.0)]
        if not short:
            return
        if time.monotonic() >= end:
            break
        _ask_autoscaler(resources, fewest)
        time.sleep(min(5.0, timeout))
    name = short[0]
    at_least = "at least " if resources.min_workers is not None else ""
    who = f"{at_least}{fewest} workers" + (" and what runs beside them" if more else "")
    raise ResourceError(
        f"{who} need {wanted[name]:g} {name}, the cluster has {have.get(name, 0.0):g}",
        place="resources",
        mend=f"lower resources.workers (or allow fewer: workers: [1, {resources.workers}]) or "
        f"{name.lower()}s_per_worker{', or what rollouts places apart' if more else ''}, or use a larger cluster",
    )


def _ask_autoscaler(resources: Resources, workers: int) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[_each(resources)] * workers)


def _settle_environment() -> None:
    """Ray Train settings the controller reads from the driver's environment, unless a person has set them."""
    # A finished or dead worker is noticed in half a second instead of two; a poll costs about 2 ms.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_GROUP_START_SECONDS))
    if "RAY_ADDRESS" not in os.environ:
        # No cloud takes this machine back: saves an actor of 110 MB.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")


def _watches_nodes() -> bool:
    return os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"


def _each(resources: Resources) -> dict[str, float]:
    found: dict[str, float] = {"CPU": resources.cpus_per_worker}
    if resources.gpus_per_worker:
        found["GPU"] = resources.gpus_per_worker
    return found


def scaling(resources: Resources) -> Any:
    """Ray Train's scaling configuration: a fixed number of workers, or a range."""
    from ray.train.v2.api.config import ScalingConfig

    return ScalingConfig(
        num_workers=resources.workers if resources.min_workers is None else (resources.min_workers, resources.workers),
        use_gpu=bool(resources.gpus_per_worker),
        resources_per_worker=_each(resources),
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def _fit(trainer: Any) -> Exception | None:
    from ray.train import TrainingFailedError

    try:
        trainer.fit()
    except TrainingFailedError as error:
        return error
    return None


def _named(failure: Exception | None, stage: str, estimate: Estimate | None, said: str) -> ResourceError | StageError:
    """The error a person sees when Ray Train has given up."""
    text = str(failure) if failure is not None else ""
    if any(sign in text for sign in _KILLED_FOR_MEMORY):
        from modelyard.train.memory import out_of_memory

        predicted = estimate.memory_bytes if estimate is not None else None
        return out_of_memory("Ray ended a worker because its machine ran out of memory",
                             free_memory(), predicted)  # fmt: skip
    lines = text.strip().splitlines()
    last = f" (before that: {said})" if said else ""
    return StageError(
        f"training workers failed: {lines[-1] if lines else 'they ended without a result'}{last}",
        place=f"stage {stage}",
        mend="run the same command again: it resumes from the last checkpoint",
    )
