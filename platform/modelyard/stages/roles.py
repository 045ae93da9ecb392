"""Roles of reinforcement learning that Ray actors play apart from the trainers: which, what they need, placing them.

All of a run's actors are in one placement group, so that a run has all of them or waits; the policy's trainers are in
that of Ray Train.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from modelyard.errors import ResourceError
from modelyard.stages.rollout_rewards import reward_models

if TYPE_CHECKING:
    from modelyard.align.options import ActorGroup
    from modelyard.stages.align import AlignOptions
    from modelyard.stages.train_worker import Place

REWARDED = ("grpo", "ppo")
"""Methods that learn from rewards of the model's own answers."""
ENGINES, REFERENCE = "engines", "reference"


@dataclass(frozen=True)
class Role:
    """What `group.count` actors do.

    Attributes:
        name: of the role among those of the run: `engines`, `reference`, or `reward_models/<input>`.
        group: how many and how large.
        place: the model they read.
        more: options of the actor that are the role's own.
    """

    name: str
    group: ActorGroup
    place: Place | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> dict[str, float]:
        """What one actor holds."""
        return {"CPU": self.group.cpus} | ({"GPU": self.group.gpus} if self.group.gpus else {})

    def __str__(self) -> str:
        gpus = f" and {self.group.gpus:g} GPU" if self.group.gpus else ""
        return f"{self.group.count} x {self.name} ({self.group.cpus:g} CPU{gpus} each)"


def roles_apart(options: AlignOptions, places: Mapping[str, Place] | None = None) -> list[Role]:
    """The roles that actors play, with the models they read where `places` knows them by the stage's inputs."""
    if options.method not in REWARDED:
        return []
    where, rollouts = places or {}, options.rollouts
    found = [
        Role(ENGINES, rollouts.engines, where.get("model")),
        Role(REFERENCE, rollouts.reference, where.get("model")),
    ]
    found += [Role(reward_role(n), rollouts.reward_models, where.get(n)) for n in reward_models(options)]
    return [role for role in found if role.group.count]


def reward_role(name: str) -> str:
    """The name of a reward model's role."""
    return f"reward_models/{name}"


def roles_need(roles: Sequence[Role]) -> dict[str, float]:
    """CPUs and GPUs of all their actors; empty where there are none."""
    need: dict[str, float] = {}
    for role in roles:
        for name, amount in role.bundle.items():
            need[name] = need.get(name, 0.0) + role.group.count * amount
    return need


@contextmanager
def placed(roles: Sequence[Role], timeout: float) -> Iterator[dict[str, tuple[str, ...]]]:
    """Places the actors of all roles in one placement group; their names by role. They end with the context.

    Args:
        roles: with the models they read.
        timeout: seconds to wait for room.

    Raises:
        ResourceError: there is no room for them in time.
    """
    import ray
    from ray.util import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = [role.bundle for role in roles for _ in range(role.group.count)]
    group = placement_group(bundles, strategy="PACK")
    actors: list[Any] = []
    names: dict[str, tuple[str, ...]] = {}
    try:
        if not group.wait(timeout):
            raise ResourceError(
                f"no room for {', '.join(map(str, roles))}",
                place="rollouts",
                mend="lower count, cpus or gpus of what stands apart, or use a larger cluster",
            )
        for role in roles:
            names[role.name] = tuple(f"{role.name}-{uuid.uuid4().hex}" for _ in range(role.group.count))
            for name in names[role.name]:
                strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=len(actors))
                actors.append(_start(role, name, strategy))
        yield names
    finally:
        for actor in actors:
            ray.kill(actor)
        remove_placement_group(group)


def _start(role: Role, name: str, strategy: Any) -> Any:
    import ray

    from modelyard.stages.rollout_actor import RolloutActor
    from modelyard.stages.scorers import ScorerActor

    group = role.group
    common = {"name": name, "num_cpus": group.cpus, "num_gpus": group.gpus, "scheduling_strategy": strategy}
    if role.name == ENGINES:
        # Its pool counts deaths: a call that is lost with an engine is asked of whichever is ready.
        return ray.remote(RolloutActor).options(**common, max_restarts=-1, **role.more).remote(role.place)
    # A scorer keeps nothing, so that Ray itself can start it again and repeat the calls it lost.
    restarting = {"max_restarts": group.restarts, "max_task_retries": -1}
    return ray.remote(ScorerActor).options(**common, **restarting).remote(role.place, max(1, int(group.cpus)))
