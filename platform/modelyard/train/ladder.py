"""A ladder of training runs, one after the other on the same workers: the points a scaling law is fitted to."""

from __future__ import annotations

import json
from dataclasses import replace

from pydantic import Field

from modelyard import storage
from modelyard.recipe.schema import Options
from modelyard.train.checkpoint import Row
from modelyard.train.hooks import Hooks
from modelyard.train.loop import Outcome
from modelyard.train.metrics import Say, Sink, StepMetrics, no_say, no_sink
from modelyard.train.programs import PretrainJob, pretrain
from modelyard.train.world import World

RESULT = "result.json"


class LadderJob(Options):
    """Runs in the order they are trained; what each came to lies in its own folder below `results`."""

    tokens: str = Field(description="local folder with train/, heldout/ and tokenizer/")
    runs: dict[str, PretrainJob] = Field(description="jobs by name; their tokens are those above")
    results: str = Field(description="URI of the folder for results; a run whose result lies there is done")


def ladder(
    job: LadderJob, world: World, sink: Sink = no_sink, say: Say = no_say, hooks: Hooks | None = None
) -> Outcome:
    """Trains every run and returns their steps as one table, in which `run` counts from 1.

    Raises:
        ModelyardError: as `programs.pretrain`.
    """
    history: list[Row] = []
    outcome = Outcome(0, 0, 0.0, 0.0, float("nan"))
    for number, (name, run) in enumerate(job.runs.items(), 1):
        place = storage.join(job.results, name, RESULT)
        if all(world.gather(storage.exists(place))):
            rows: list[Row] = json.loads(storage.read_bytes(place))["history"]
        else:
            job_of_run = run.model_copy(update={"tokens": job.tokens})
            outcome = pretrain(job_of_run, world, _after(sink, len(history)), say, hooks)
            rows = outcome.history
            if world.leads:
                _keep(place, outcome)
                say(f"{name}: {outcome.parameters:,} parameters, held-out loss {outcome.heldout_loss:.4f}")
            world.barrier()
        first = len(history)
        history += [row | {"step": first + row["step"], "run": number} for row in rows]
    return replace(outcome, steps=len(history), history=history)


def _after(sink: Sink, steps: int) -> Sink:
    """Counts the steps of the runs before in, so that the bar and the curves move on."""

    def moved(metrics: StepMetrics) -> None:
        sink(replace(metrics, step=steps + metrics.step))

    return moved


def _keep(place: str, outcome: Outcome) -> None:
    found = {
        "parameters": outcome.parameters,
        "tokens": outcome.tokens,
        "steps": outcome.steps,
        "loss": outcome.loss,
        "heldout_loss": outcome.heldout_loss,
        "seconds": outcome.seconds,
        "stopped": outcome.stopped,
        "history": outcome.history,
    }
    storage.write_bytes(place, json.dumps(found).encode())
