"""Rollout engines apart from the trainers: placing them in a group of their own, and the program that uses them."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelyard.align.reinforce import ReinforceJob
from modelyard.errors import ResourceError
from modelyard.stages.train_worker import Place
from modelyard.train.hooks import Hooks

if TYPE_CHECKING:
    from modelyard.align.environment import Telling
    from modelyard.align.options import EngineGroup, RolloutEngine
    from modelyard.stages.rollout_pool import RayPool
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import Say, Sink
    from modelyard.train.world import World


class ApartJob(ReinforceJob):
    """Reinforcement learning with engines apart."""

    actors: tuple[str, ...] = Field(description="names of the engines' actors")


def reinforce(job: ApartJob, world: World, sink: Sink, say: Say, hooks: Hooks | None) -> Outcome:
    """`align.reinforce.reinforce` with the answers of Ray actors."""
    from modelyard.align import reinforce as core
    from modelyard.stages.remote import plain_errors

    def pool(settings: RolloutEngine, telling: Telling | None) -> RayPool:
        import ray

        from modelyard.stages.rollout_pool import RayPool

        group = job.rollouts.engines
        apart = settings.placed(group.gpus).model_copy(update={"threads": max(1, int(group.cpus))})
        return RayPool([ray.get_actor(name) for name in job.actors], apart, telling, group, say)

    with plain_errors():
        return core.reinforce(job, world, sink, say, hooks, pool)


@contextmanager
def placed(model: Place, group: EngineGroup, calls: int, timeout: float) -> Iterator[tuple[str, ...]]:
    """Names of actors that hold one engine each, in a placement group; they end with the context.

    Args:
        model: the folder they read.
        group: how many and how large.
        calls: most that one may have open at a time.
        timeout: seconds to wait for room.

    Raises:
        ResourceError: there is no room for them in time.
    """
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from modelyard.stages.rollout_actor import RolloutActor

    bundle = {"CPU": group.cpus} | ({"GPU": group.gpus} if group.gpus else {})
    place = placement_group([bundle] * group.count, strategy="PACK")
    actors: list[Any] = []
    names = tuple(f"rollout-{uuid.uuid4().hex}" for _ in range(group.count))
    try:
        if not place.wait(timeout):
            raise ResourceError(
                f"no room for {group.count} rollout engines of {group.cpus:g} CPU and {group.gpus:g} GPU each",
                place="rollouts.engines",
                mend="lower count, cpus or gpus, or use a larger cluster",
            )
        for number, name in enumerate(names):
            strategy = PlacementGroupSchedulingStrategy(place, placement_group_bundle_index=number)
            remote = ray.remote(RolloutActor).options(
                name=name, num_cpus=group.cpus, num_gpus=group.gpus, scheduling_strategy=strategy, max_restarts=-1,
                max_concurrency=calls,
            )  # fmt: skip
            actors.append(remote.remote(model))
        yield names
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(place)
