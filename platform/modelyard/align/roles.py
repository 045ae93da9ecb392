"""The roles beside the policy in training: engines that answer, the reference, reward models.

Here the trainer plays all of them itself, in turns. `stages.rollout_roles` has those that actors play apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from modelyard.align.environment import Telling
from modelyard.align.options import RolloutEngine, RolloutOptions
from modelyard.align.pool import LocalPool, Pool
from modelyard.align.scoring import ReferenceSetup, RewardSetup, Scorer
from modelyard.engine.choose import stepper
from modelyard.errors import RecipeError


class Roles:
    """Every role in this process. Another way to play one is a subclass."""

    def check(self, rollouts: RolloutOptions) -> None:
        """Raises RecipeError where actors are asked for that nobody has placed."""
        for name in ("engines", "reference", "reward_models"):
            if getattr(rollouts, name).count:
                raise RecipeError("roles apart from the trainers are Ray actors", place=f"rollouts.{name}.count",
                                  mend="run it as a stage, or use count: 0")  # fmt: skip

    def pool(self, model: Path, settings: RolloutEngine, telling: Telling | None, leads: bool) -> Pool | None:
        """What answers: this worker's own, or one that serves all workers, which the one that `leads` asks alone.

        Raises:
            DataError, ResourceError: as `engine.choose.start`.
        """
        return LocalPool([stepper(model, beside_trainer(settings))], model, telling=telling)

    def reference(self, model: Path, settings: RolloutEngine) -> Scorer:
        """The model before training, of a policy without an adapter."""
        return ReferenceSetup(beside_trainer(settings)).build(model)

    def reward_models(self, folders: Mapping[str, str], setup: RewardSetup) -> dict[str, Scorer]:
        """Reward models by name; `folders` are those this worker has."""
        return {name: setup.build(Path(folder)) for name, folder in folders.items()}


def beside_trainer(settings: RolloutEngine) -> RolloutEngine:
    """Of an engine in the trainer's process: `backend: auto` is native, for vLLM takes a GPU's memory for itself."""
    return settings.model_copy(update={"backend": "native"}) if settings.backend == "auto" else settings
