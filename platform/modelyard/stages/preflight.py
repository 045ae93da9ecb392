"""What can be refused before any work: each stage's own check, memory, and free disk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

from modelyard.errors import ModelyardError, ResourceError
from modelyard.planner.cost import carbon_intensity
from modelyard.planner.estimate import Estimate
from modelyard.planner.machine import free_memory
from modelyard.recipe import Recipe
from modelyard.stages.graph import Planned, plan_context
from modelyard.storage import Artifact, is_remote

# Ray itself (head processes, object store) and the driver, measured on a laptop session.
RAY_BYTES = 1_200_000_000
DISK_BYTES = 1_000_000_000


def preflight(
    recipe: Recipe, planned: Mapping[str, Planned], artifacts: Mapping[str, Artifact], *, here: bool = True
) -> dict[str, Estimate]:
    """Checks every stage that would run and returns its estimate.

    Args:
        recipe: the loaded recipe.
        planned: its stages, in order.
        artifacts: what is published already, by stage.
        here: the workers will be on this machine, whose memory is known; False on a cluster.

    Raises:
        ModelyardError: from a stage's `check`, with the stage named.
        ResourceError: a stage needs more memory than this machine has, or the disk is nearly full.
    """
    estimates: dict[str, Estimate] = {}
    for name, entry in planned.items():
        if entry.artifact is not None:
            continue
        ctx = plan_context(recipe, entry, artifacts, here=here)
        try:
            entry.node.stage.check(ctx)
            carbon_intensity(entry.node.options.resources.region)
            estimates[name] = entry.node.stage.estimate(ctx)
        except ModelyardError as error:
            error.place = f"stages.{name}: {error.place}".rstrip(": ")
            raise
        _memory(name, entry, estimates[name], here)
    _disk(recipe.root)
    return estimates


def _memory(name: str, entry: Planned, estimate: Estimate, here: bool) -> None:
    resources = entry.node.options.resources
    needed = estimate.memory_bytes
    if needed is None:
        return
    limit = resources.memory_per_worker
    if limit is not None and needed > limit:
        raise ResourceError(
            f"a worker is predicted to need {needed / 2**30:.1f} GiB and may use {limit / 2**30:.1f} GiB",
            place=f"stages.{name}.resources.memory_per_worker",
            mend="raise it, use more workers (the model is sharded over them), a smaller model, batch or sequence",
        )
    # GPU workers and clusters have memory we cannot see from here.
    if resources.gpus_per_worker or resources.hardware or not here:
        return
    have = free_memory()
    total = needed * resources.workers + RAY_BYTES
    if total > have:
        raise ResourceError(
            f"{resources.workers} workers are predicted to need {total / 2**30:.1f} GiB here"
            f" and {have / 2**30:.1f} GiB are free",
            place=f"stages.{name}",
            mend="use fewer workers, a smaller model, batch or sequence, close other programs, or submit to a cluster",
        )


def _disk(root: str) -> None:
    if is_remote(root):
        return
    free = shutil.disk_usage(root).free
    if free < DISK_BYTES:
        raise ResourceError(
            f"only {free / 1e9:.1f} GB of disk are free",
            place=root,
            mend="free some (`modelyard gc`), or choose another root",
        )
