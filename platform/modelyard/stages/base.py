"""What a stage is: one class a kind, three methods, and the context the graph runner hands it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import StageOptions
from modelyard.storage import Artifact, Files

if TYPE_CHECKING:
    from modelyard.stages.progress import Progress
    from modelyard.tracking import Run

O = TypeVar("O", bound=StageOptions)  # noqa: E741


@dataclass(frozen=True)
class InputSpec:
    """One named input of a stage kind.

    Args:
        kinds: stage kinds whose artifact is accepted; empty = none.
        files: whether paths, globs and URIs are accepted.
        required: whether the stage needs it.
    """

    kinds: tuple[str, ...] = ()
    files: bool = False
    required: bool = True


@dataclass(frozen=True)
class PlanContext(Generic[O]):
    """What is known before anything runs. `inputs` holds only artifacts that already exist, and raw files."""

    name: str
    options: O
    recipe: str
    root: str
    inputs: Mapping[str, Artifact | Files]
    upstream: Mapping[str, StageOptions]
    """Options of the stages this one reads from, by input name, whether they have run or not."""
    models: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Configurations of the models that stages this one reads from have yet to leave, by input name, where known."""
    here: bool = True
    """Whether workers will run in this environment, not on a cluster that may have another."""


@dataclass(frozen=True)
class StageContext(Generic[O]):
    """What a running stage gets.

    Attributes:
        name: the stage's name in the recipe.
        recipe: the recipe's name.
        options: the validated options.
        fingerprint: hex digest of what decides the result.
        root: URI of the recipe's root.
        inputs: every declared input: an `Artifact` of another stage, or `Files`.
        output: URI of the folder to write. It may hold leftovers of an interrupted try: overwrite them.
        work: URI of a scratch folder that survives a crash (checkpoints, intermediates) and is removed
            once the artifact is published.
        run: the MLflow run of this stage.
        progress: the progress display.
        keep: whether the person asked to leave what was deployed running.
        estimate: what was predicted with every input known, to compare with.
    """

    name: str
    recipe: str
    options: O
    fingerprint: str
    root: str
    inputs: Mapping[str, Artifact | Files]
    output: str
    work: str
    run: Run
    progress: Progress
    keep: bool = False
    estimate: Estimate = field(default_factory=Estimate)

    def artifact(self, name: str) -> Artifact:
        """The artifact given as input `name`. Raises KeyError when it was not given."""
        value = self.inputs[name]
        assert isinstance(value, Artifact), f"input {name} of {self.name} is not an artifact"
        return value


@dataclass(frozen=True)
class StageResult:
    """What came out: integers that count (documents, tokens), floats that measure, one line for people."""

    summary: str
    counts: Mapping[str, int] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Anything else small and JSON-able that a later stage reads from the manifest."""


class Stage(Generic[O]):
    """A stage kind.

    `version` goes up when the same options would give another result; it enters the fingerprint.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    Options: ClassVar[type[StageOptions]]
    inputs: ClassVar[Mapping[str, InputSpec]] = {}
    more: ClassVar[InputSpec | None] = None
    """What inputs of any other name are, for a kind that takes several of a sort; one at least where all are such."""

    def input_specs(self, given: Iterable[str]) -> dict[str, InputSpec]:
        """The inputs the kind has by name, those of `given` that `more` allows among them."""
        more = self.more
        return dict(self.inputs) | ({name: more for name in given if name not in self.inputs} if more else {})

    def check(self, ctx: PlanContext[O]) -> None:
        """Raises a ModelyardError for a mistake that can be seen before any work. Must be cheap."""

    def estimate(self, ctx: PlanContext[O]) -> Estimate:
        """Predicted needs, for `modelyard plan`."""
        return Estimate()

    def leaves(self, ctx: PlanContext[O]) -> Mapping[str, Any] | None:
        """The configuration of the model this stage will leave; None = no model, or not known yet."""
        return None

    def demand(self, options: O) -> dict[str, float]:
        """Ray resources the stage holds while it runs, so that the runner knows what fits side by side."""
        r = options.resources
        demand = {"CPU": r.fewest * r.cpus_per_worker}
        return demand | ({"GPU": r.fewest * r.gpus_per_worker} if r.gpus_per_worker else {})

    def run(self, ctx: StageContext[O]) -> StageResult:
        """Does the work: reads `ctx.inputs`, writes under `ctx.output`, returns what came out."""
        raise NotImplementedError
