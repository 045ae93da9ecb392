"""Reinforcement learning with roles apart: the program of a trainer that asks Ray actors instead of itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modelyard.align.reinforce import ReinforceJob
from modelyard.align.roles import Roles
from modelyard.stages.roles import ENGINES, REFERENCE, reward_role
from modelyard.train.hooks import Hooks

if TYPE_CHECKING:
    from modelyard.align.environment import Telling
    from modelyard.align.options import RolloutEngine, RolloutOptions
    from modelyard.align.pool import Pool
    from modelyard.align.scoring import RewardSetup, Scorer, Setup
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import Say, Sink
    from modelyard.train.world import World


class ApartJob(ReinforceJob):
    """Reinforcement learning with roles apart."""

    actors: dict[str, tuple[str, ...]] = Field(description="names of actors by the role they play")


class ApartRoles(Roles):
    """Roles that actors play; those without any are the trainer's own.

    Args:
        rollouts: how large the actors are and how long to wait for them.
        actors: their names by role, as `stages.roles.placed` gives them.
        say: takes messages for people.
    """

    def __init__(self, rollouts: RolloutOptions, actors: Mapping[str, tuple[str, ...]], say: Say) -> None:
        self._rollouts, self._names, self._say = rollouts, actors, say

    def check(self, rollouts: RolloutOptions) -> None:
        """Whatever is asked for has been placed."""

    def pool(self, model: Path, settings: RolloutEngine, telling: Telling | None, leads: bool) -> Pool | None:
        """See `Roles`."""
        from modelyard.stages.rollout_pool import RayPool

        if ENGINES not in self._names:
            return super().pool(model, settings, telling, leads)
        if not leads:
            return None
        group = self._rollouts.engines
        apart = settings.placed(group.gpus).model_copy(update={"threads": max(1, int(group.cpus))})
        return RayPool(self._actors(ENGINES), apart, telling, group, self._say)

    def reference(self, model: Path, settings: RolloutEngine) -> Scorer:
        """See `Roles`."""
        from modelyard.align.scoring import ReferenceSetup

        group = self._rollouts.reference
        if REFERENCE not in self._names:
            return super().reference(model, settings)
        apart = settings.placed(group.gpus).model_copy(update={"threads": max(1, int(group.cpus))})
        return self._scorer(REFERENCE, ReferenceSetup(apart))

    def reward_models(self, folders: Mapping[str, str], setup: RewardSetup) -> dict[str, Scorer]:
        """See `Roles`."""
        from modelyard.align.scoring import RewardSetup

        apart = RewardSetup("cuda" if self._rollouts.reward_models.gpus else "cpu", setup.longest)
        names = [name.removeprefix(reward_role("")) for name in self._names if name.startswith(reward_role(""))]
        found = super().reward_models(folders, setup)
        return found | {name: self._scorer(reward_role(name), apart) for name in names}

    def _scorer(self, role: str, setup: Setup) -> Scorer:
        from modelyard.stages.scorers import RayScorer

        group = self._rollouts.reference if role == REFERENCE else self._rollouts.reward_models
        return RayScorer(role, self._actors(role), setup, group, self._say)

    def _actors(self, role: str) -> list[Any]:
        import ray

        return [ray.get_actor(name) for name in self._names[role]]


def reinforce(job: ApartJob, world: World, sink: Sink, say: Say, hooks: Hooks | None) -> Outcome:
    """`align.reinforce.reinforce` with the roles of Ray actors."""
    from modelyard.align import reinforce as core
    from modelyard.stages.remote import plain_errors

    with plain_errors():
        return core.reinforce(job, world, sink, say, hooks, ApartRoles(job.rollouts, job.actors, say))
