"""Stage `merge`: several models of one architecture become one, without data (model soups, SLERP, TIES)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelyard.errors import RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import StageOptions
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.remote import plain_errors
from modelyard.stages.training import MODELS, known_model, model_config, model_place

if TYPE_CHECKING:
    from modelyard.stages.train_worker import Place

_BASE = "base"


class MergeOptions(StageOptions):
    """How models are merged."""

    kind: Literal["merge"] = Field(description="stage kind")
    method: Literal["linear", "slerp", "ties"] = Field(
        "linear",
        description="linear: weighted mean (arXiv 2203.05482); slerp: two models along an arc; ties: changes against "
        "the input `base`, trimmed and agreed in sign (arXiv 2306.01708)",
    )
    weights: dict[str, float] = Field({}, description="weight of each input by its name; others have 1")
    density: float = Field(0.2, gt=0, le=1, description="for ties: share of a tensor's change that stays (paper: 0.2)")
    scale: float = Field(1.0, gt=0, description="for ties: factor of the merged change (paper: 1)")


class MergeStage(Stage[MergeOptions]):
    """See the module."""

    kind = "merge"
    Options = MergeOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {_BASE: InputSpec(kinds=MODELS, files=True, required=False)}
    more = InputSpec(kinds=MODELS, files=True)
    """The models to merge, by names of your own."""

    def check(self, ctx: PlanContext[MergeOptions]) -> None:
        """Raises RecipeError for too few or too many models, weights of no input, or models of different shapes."""
        options, names = ctx.options, merged_inputs(ctx.options)
        if len(names) < 2 or (options.method == "slerp" and len(names) > 2):
            wanted = "two models" if options.method == "slerp" else "two models at least"
            raise RecipeError(f"{options.method} merges {wanted}, here are {len(names)}", place="inputs",
                              mend="name each model as an input: `first: ...`, `second: ...`")  # fmt: skip
        if (options.method == "ties") is not (_BASE in options.inputs):
            raise RecipeError("ties, and only ties, needs the input base", place="inputs.base",
                              mend="give the model that all were trained from")  # fmt: skip
        for name, weight in options.weights.items():
            if name not in names or weight <= 0:
                raise RecipeError(f"the weight of {name!r} is {weight:g}", place=f"weights.{name}",
                                  mend=f"give positive weights of {', '.join(names)}")  # fmt: skip
        _check_alike(ctx)

    def estimate(self, ctx: PlanContext[MergeOptions]) -> Estimate:
        """Nothing to predict: it reads and writes each tensor once."""
        return Estimate(notes=("the merged model is held in memory, in float32",))

    def leaves(self, ctx: PlanContext[MergeOptions]) -> Mapping[str, Any] | None:
        """That of the models it merges, which are alike."""
        return next(filter(None, (known_model(ctx, name) for name in merged_inputs(ctx.options))), None)

    def run(self, ctx: StageContext[MergeOptions]) -> StageResult:
        """Merges on a worker and writes `model/` with the first model's tokenizer."""
        import ray

        options, names = ctx.options, merged_inputs(ctx.options)
        places = {name: model_place(value, name) for name, value in ctx.inputs.items()}
        remote = ray.remote(num_cpus=options.resources.cpus_per_worker)(_merge)
        with plain_errors():
            parameters = ray.get(remote.remote(options, places, names, ctx.output))
        return StageResult(
            f"{' + '.join(names)} by {options.method}, {parameters / 1e6:.1f} M parameters",
            counts={"parameters": parameters, "models": len(names)},
        )


def merged_inputs(options: MergeOptions) -> list[str]:
    """Names of the models to merge."""
    return [name for name in options.inputs if name != _BASE]


def _check_alike(ctx: PlanContext[MergeOptions]) -> None:
    fields = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
    known = {name: model_config(value, name) for name, value in ctx.inputs.items()}
    shapes = {name: tuple(config.get(f) for f in fields) for name, config in known.items() if config is not None}
    first = next(iter(shapes), "")
    for name, shape in shapes.items():
        if shape != shapes[first]:
            odd = next(f for f, a, b in zip(fields, shapes[first], shape, strict=True) if a != b)
            raise RecipeError(f"{first} and {name} differ in {odd}", place=f"inputs.{name}",
                              mend="merge models trained from one base")  # fmt: skip


def _merge(options: MergeOptions, places: Mapping[str, Place], names: list[str], output: str) -> int:
    """Runs on a worker; the number of parameters."""
    import torch

    from modelyard.models.export import export_model, read_config
    from modelyard.models.merging import linear, merge_folders, slerp, ties
    from modelyard.stages.train_worker import bring
    from modelyard.train.programs import written

    folders = {name: Path(str(bring(place))) for name, place in places.items()}
    weights = [options.weights.get(name, 1.0) for name in names]

    def merge(base: torch.Tensor | None, tensors: Any) -> torch.Tensor:
        if options.method == "ties":
            assert base is not None
            return ties(base, tensors, weights, options.density, options.scale)
        return (slerp if options.method == "slerp" else linear)(tensors, weights)

    first = folders[names[0]]
    state = merge_folders([folders[name] for name in names], folders.get(_BASE), merge)
    with written(output) as target:
        export_model(read_config(first), state, target / "model", first)
    return sum(tensor.numel() for tensor in state.values())
