"""Runs that a killed process left RUNNING: resume the same recipe's, close the others."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from modelyard.tracking.run import owner_alive
from modelyard.tracking.sink import FINGERPRINT, HEARTBEAT, OWNER, PARENT, STAGE, Sink, run_tags
from modelyard.tracking.spool import STALE_S
from modelyard.tracking.store import translated


@dataclass
class Orphan:
    """A recipe run without a living process, and the runs of its stages that were still open."""

    run_id: str
    stages: dict[tuple[str, str], str] = field(default_factory=dict)
    """(stage name, fingerprint) -> run id."""


def recover(sink: Sink, recipe: str, fingerprint: str) -> Orphan | None:
    """Marks orphaned runs of `recipe` KILLED, except the newest of the same fingerprint, which is returned.

    A run is an orphan when its process is gone, or, on another host, has given no sign for ten minutes.

    Raises:
        Unreachable: MLflow went away.
    """
    with translated(sink.store.uri):
        dead = [run for run in _running(sink, recipe) if not _alive(run)]
        parents = [r for r in dead if STAGE not in run_tags(r)]
        kept = next((r.info.run_id for r in parents if run_tags(r).get(FINGERPRINT) == fingerprint), None)
        orphan = Orphan(kept) if kept else None
        for run in dead:
            tags = run_tags(run)
            if orphan and tags.get(PARENT) == orphan.run_id:
                orphan.stages[tags[STAGE], tags[FINGERPRINT]] = run.info.run_id
            elif not orphan or run.info.run_id != orphan.run_id:
                sink.client.set_terminated(run.info.run_id, "KILLED", end_time=_last_sign(run))
        return orphan


def _running(sink: Sink, recipe: str) -> list[Any]:
    experiment = sink.experiment(recipe)
    query = "attributes.status = 'RUNNING'"
    return list(sink.client.search_runs([experiment], query, order_by=["attributes.start_time DESC"], max_results=1000))


def _last_sign(run: Any) -> int:
    """Milliseconds since the epoch of the last sign of life."""
    return int(run_tags(run).get(HEARTBEAT) or run.info.start_time)


def _alive(run: Any) -> bool:
    owner = run_tags(run).get(OWNER)
    if owner is None:  # not a run of modelyard
        return True
    alive = owner_alive(owner)
    return alive if alive is not None else time.time() - _last_sign(run) / 1000 < STALE_S
