"""Runs a planned graph: ready stages side by side, each an MLflow run, finished work skipped."""

from __future__ import annotations

import fcntl
import hashlib
import os
import queue
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from modelyard.errors import ModelyardError, ResourceError, StageError
from modelyard.recipe import Recipe, fingerprint
from modelyard.stages import session
from modelyard.stages.base import StageContext, StageResult
from modelyard.stages.graph import Planned, anchored, input_entries, plan_context, plan_graph, recorded
from modelyard.stages.preflight import preflight
from modelyard.stages.progress import Display, Progress
from modelyard.stages.spending import Spending, log_prediction
from modelyard.storage import Artifact, ArtifactStore, Files, Manifest

if TYPE_CHECKING:
    from modelyard.tracking import Run, Tracker


@dataclass
class Outcome:
    """What one execution of a recipe gave: an artifact a stage, and which of them were made just now."""

    recipe: Recipe
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    seconds: float = 0.0
    started_ray: bool = False


@dataclass
class _Execution:
    """State shared by the threads of one execution."""

    recipe: Recipe
    planned: dict[str, Planned]
    store: ArtifactStore
    tracker: Tracker
    parent: Run
    display: Display
    keep: bool
    outcome: Outcome
    here: bool
    """Whether the workers run on this machine."""
    finished: queue.Queue[tuple[str, BaseException | None]] = field(default_factory=queue.Queue)


def run(
    recipe: Recipe,
    *,
    force: frozenset[str] = frozenset(),
    keep: bool = False,
    address: str | None = None,
    display: Display | None = None,
) -> Outcome:
    """Runs a recipe to its end.

    Args:
        recipe: a loaded recipe.
        force: stages to run although they are published.
        keep: leave what was deployed running (the caller then waits and shuts down).
        address: a Ray cluster; None = `RAY_ADDRESS` or a local Ray.
        display: where progress goes.

    Raises:
        ModelyardError: a mistake found before work starts, or what a stage raised.
        StageError: a stage failed in a way it did not foresee; the traceback is in MLflow.
    """
    recipe = anchored(recipe)
    started = time.monotonic()
    store = ArtifactStore(recipe.root)
    store.check()
    with _locked(recipe.root):
        planned = {entry.node.name: entry for entry in plan_graph(recipe, force | _deployments(recipe, keep))}
        outcome = Outcome(recipe, {name: e.artifact for name, e in planned.items() if e.artifact})
        todo = [entry for entry in planned.values() if entry.artifact is None]
        if todo:
            here = address is None and "RAY_ADDRESS" not in os.environ
            preflight(recipe, planned, outcome.artifacts, here=here)
            with display or Display() as screen:
                _execute(recipe, planned, store, outcome, screen, keep, address, here)
    outcome.seconds = time.monotonic() - started
    return outcome


def _deployments(recipe: Recipe, keep: bool) -> frozenset[str]:
    # A deployment that should stay up has to be made even if an earlier one was published, and so has one of an alias,
    # which may mean another version by now.
    return frozenset(
        name
        for name, options in recipe.stages.items()
        if options.kind == "deploy" and (keep or getattr(options, "reference", None) is not None)
    )


@contextmanager
def _locked(root: str) -> Iterator[None]:
    """One run at a time on a root from this machine: two would write the same folders."""
    folder = Path(tempfile.gettempdir()) / f"modelyard-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(root.encode()).hexdigest()[:16]}.lock"
    with path.open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            raise ResourceError(
                f"another run uses this root (process {handle.read().strip() or 'unknown'})",
                place=root,
                mend="wait for it, end it, or choose another root with --set root=...",
            ) from error
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def _execute(
    recipe: Recipe,
    planned: dict[str, Planned],
    store: ArtifactStore,
    outcome: Outcome,
    display: Display,
    keep: bool,
    address: str | None,
    here: bool,
) -> None:
    from modelyard.tracking import Tracker

    todo = {name: entry for name, entry in planned.items() if entry.artifact is None}
    most = max(entry.node.stage.demand(entry.node.options).get("CPU", 1.0) for entry in todo.values())
    tracker = Tracker(recipe.root, recipe.name, say=display.say)
    outcome.started_ray = session.start(most, address)
    parent = tracker.start_recipe(
        params={"root": recipe.root}, tags={"stages": ",".join(todo)}, fingerprint=_identity(planned)
    )
    execution = _Execution(recipe, planned, store, tracker, parent, display, keep, outcome, here)
    status = "KILLED"
    try:
        _schedule(execution, todo)
        status = "FINISHED"
    except ModelyardError:
        status = "FAILED"
        raise
    finally:
        parent.end(status)
        tracker.close()
        if outcome.started_ray and not (keep and status == "FINISHED"):
            session.stop()


def _identity(planned: dict[str, Planned]) -> str:
    """One fingerprint of the whole execution: a rerun after a crash continues the same MLflow run."""
    return fingerprint("recipe", 1, {}, {name: entry.fingerprint for name, entry in planned.items()})


def _schedule(execution: _Execution, todo: dict[str, Planned]) -> None:
    """Starts every ready stage that fits beside those running, until all are done or one failed."""
    import ray

    total = ray.cluster_resources()
    free = {"CPU": total.get("CPU", 1.0), "GPU": total.get("GPU", 0.0)}
    capacity = dict(free)
    waiting = dict(todo)
    running: dict[str, dict[str, float]] = {}
    failure: BaseException | None = None
    while running or (waiting and failure is None):
        if failure is None:
            for name in [n for n, e in waiting.items() if _ready(execution, e)]:
                # An elastic cluster grows on demand: what exceeds it runs alone and lets Ray wait for nodes.
                demand = {k: min(v, capacity.get(k, v)) for k, v in _demand(waiting[name]).items()}
                if all(free.get(k, 0.0) >= v for k, v in demand.items()):
                    for key, value in demand.items():
                        free[key] = free.get(key, 0.0) - value
                    running[name] = demand
                    _launch(execution, waiting.pop(name))
        if not running:
            break
        name, error = _next(execution.finished)
        for key, value in running.pop(name).items():
            free[key] += value
        failure = failure or error
    if failure is not None:
        raise failure


def _next(finished: queue.Queue[tuple[str, BaseException | None]]) -> tuple[str, BaseException | None]:
    # A bounded wait keeps the main thread open to Ctrl-C.
    while True:
        try:
            return finished.get(timeout=0.5)
        except queue.Empty:
            continue


def _demand(entry: Planned) -> dict[str, float]:
    return entry.node.stage.demand(entry.node.options)


def _ready(execution: _Execution, entry: Planned) -> bool:
    return all(before in execution.outcome.artifacts for before in entry.node.after.values())


def _launch(execution: _Execution, entry: Planned) -> None:
    def work() -> None:
        error: BaseException | None = None
        try:
            _run_stage(execution, entry)
        except BaseException as raised:  # handed to the main thread, which raises it there
            error = raised
        execution.finished.put((entry.node.name, error))

    # Daemon: after Ctrl-C the process must not wait for a stage that still computes.
    threading.Thread(target=work, name=f"stage-{entry.node.name}", daemon=True).start()


def _run_stage(execution: _Execution, entry: Planned) -> None:
    name, options, recipe = entry.node.name, entry.node.options, execution.recipe
    inputs: dict[str, Artifact | Files] = dict(entry.files)
    inputs |= {key: execution.outcome.artifacts[before] for key, before in entry.node.after.items()}
    # What could not be checked before its inputs existed is checked now, before the work.
    planning = plan_context(recipe, entry, execution.outcome.artifacts)
    entry.node.stage.check(planning)
    estimate = entry.node.stage.estimate(planning)
    draft = execution.store.draft(name, entry.fingerprint)
    run = execution.tracker.start_stage(
        execution.parent,
        stage=name,
        kind=options.kind,
        params=recorded(options),
        inputs=input_entries(entry, inputs),
        fingerprint=entry.fingerprint,
    )
    progress = Progress(execution.display, name)
    ctx = StageContext(
        name, recipe.name, options, entry.fingerprint, recipe.root, inputs, draft.uri, draft.work, run, progress,
        execution.keep, estimate,
    )  # fmt: skip
    log_prediction(run, estimate)
    spending = Spending(options.resources, _demand(entry), here=execution.here)
    started = datetime.now(UTC)
    progress.say(f"{options.kind} started")
    try:
        with spending:
            result = _attempts(lambda: entry.node.stage.run(ctx), options.retries, progress)
    except BaseException as error:
        run.log_text("error.txt", "".join(traceback.format_exception(error)))
        run.end("FAILED")
        raise _explained(name, recipe, error) from error
    result = replace(result, metrics={**result.metrics, **spending.metrics()})
    artifact = draft.publish(_manifest(execution, entry, inputs, result, started, run.id))
    run.log_metrics({**{k: float(v) for k, v in result.counts.items()}, **result.metrics})
    run.set_tags({"artifact": artifact.uri, "summary": result.summary} | spending.tags())
    run.end("FINISHED")
    execution.outcome.artifacts[name] = artifact
    execution.outcome.ran.append(name)
    progress.say(f"{result.summary}  [dim]({artifact.manifest.seconds:.0f} s)[/]")


def _attempts(work: Callable[[], StageResult], retries: int, progress: Progress) -> StageResult:
    for left in range(retries, 0, -1):
        try:
            return work()
        except ModelyardError as error:
            if error.exit_code == 2:
                raise
            progress.say(f"[yellow]failed, {left} more {'try' if left == 1 else 'tries'}[/]: {error.what}")
    return work()


def _explained(stage: str, recipe: Recipe, error: BaseException) -> BaseException:
    if isinstance(error, ModelyardError):
        error.place = (
            error.place if error.place.startswith(f"stage {stage}") else f"stage {stage}: {error.place}".rstrip(": ")
        )
        return error
    if type(error).__name__ == "OutOfMemoryError":  # Ray's, of any actor or task: a page of advice about Ray itself
        return ResourceError(
            "Ray ended a process of the stage because the machine ran out of memory",
            place=f"stage {stage}",
            mend="end what else uses memory here, or ask for less (micro_batch, workers); the same command resumes",
        )
    last = str(error).strip().splitlines()
    return StageError(
        f"{type(error).__name__}: {last[-1] if last else ''}",
        place=f"stage {stage}",
        mend="the traceback is in the stage's MLflow run (error.txt); the same command resumes from here",
    )


def _manifest(
    execution: _Execution,
    entry: Planned,
    inputs: dict[str, Artifact | Files],
    result: StageResult,
    started: datetime,
    run_id: str | None,
) -> Manifest:
    from modelyard import __version__

    return Manifest(
        stage=entry.node.name,
        kind=entry.node.options.kind,
        kind_version=entry.node.stage.version,
        fingerprint=entry.fingerprint,
        recipe=execution.recipe.name,
        options=recorded(entry.node.options),
        inputs=input_entries(entry, inputs),
        code_version=__version__,
        started=started,
        ended=datetime.now(UTC),
        run_id=run_id,
        summary=result.summary,
        counts=dict(result.counts),
        metrics=dict(result.metrics),
        extra=dict(result.extra),
    )
