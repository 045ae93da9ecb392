"""`classifier`: a linear text classifier from good and bad examples, for the steps `classify` and `toxicity`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from modelyard.corpus.options import ReadOptions
from modelyard.errors import RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.recipe.schema import Bytes, Options, StageOptions
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.storage import Files

_BYTES_PER_SECOND = 8_000_000  # of text, features and five passes
_START_SECONDS = 25.0


class LabelOptions(Options):
    """Which documents of the input `labelled` are good: by a field that their reader puts into `meta`."""

    field: str = Field(min_length=1, description="field or column beside the text")
    good: tuple[str, ...] = Field(min_length=1, description="its values (as text) that mean good")
    bad: tuple[str, ...] | None = Field(None, description="its values that mean bad; null = all others")


class ClassifierOptions(StageOptions):
    """Trains on the inputs `good` against `bad`, or on one input `labelled` with `label`."""

    kind: Literal["classifier"] = Field("classifier", description="stage kind")
    read: ReadOptions = Field(ReadOptions(), description="how files become documents")
    label: LabelOptions | None = Field(None, description="how the documents of `labelled` are labelled")
    bits: int = Field(
        18, ge=10, le=24, description="2 ** bits weights, 4 bytes each; own choice, collisions cost little"
    )
    epochs: int = Field(5, ge=1, description="passes over the training documents; fastText's default")
    learning_rate: float = Field(0.5, gt=0, description="AdaGrad's first step, falling to 0; own choice")
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of documents, by hash of id, that calibrate (half) and measure (half)"
    )
    max_bytes: Bytes = Field(
        200_000_000,
        description="text read of each class, bytes, in input order; memory is about twice that",
    )
    seed: int = Field(0, description="of the order in training")


class ClassifierStage(Stage[ClassifierOptions]):
    """Makes `model.safetensors` and `classifier.json`. See `docs/corpus.md`."""

    kind = "classifier"
    version = 1
    Options: ClassVar[type[StageOptions]] = ClassifierOptions
    inputs: ClassVar = {
        "good": InputSpec(kinds=("curate",), files=True, required=False),
        "bad": InputSpec(kinds=("curate",), files=True, required=False),
        "labelled": InputSpec(kinds=("curate",), files=True, required=False),
    }

    def check(self, ctx: PlanContext[ClassifierOptions]) -> None:
        """The inputs are `good` and `bad`, or `labelled` with the option `label`.

        Raises:
            RecipeError: they are not.
        """
        given = set(ctx.options.inputs)
        pair, one = given == {"good", "bad"}, given == {"labelled"} and ctx.options.label is not None
        if not pair and not one:
            raise RecipeError(
                f"a classifier cannot be trained on {', '.join(sorted(given)) or 'nothing'}",
                place=f"{ctx.name}.inputs",
                mend="give `good` and `bad`, or `labelled` together with the option `label`",
            )

    def estimate(self, ctx: PlanContext[ClassifierOptions]) -> Estimate:
        """Time from the bytes to read; memory from the features they can have."""
        size = sum(v.bytes for v in ctx.inputs.values() if isinstance(v, Files))
        held = min(size, 2 * ctx.options.max_bytes)
        memory = 400_000_000 + 2 * held + 12 * 2**ctx.options.bits
        return Estimate(memory_bytes=memory, seconds=_START_SECONDS + held / _BYTES_PER_SECOND)

    def run(self, ctx: StageContext[ClassifierOptions]) -> StageResult:
        """Trains in one Ray task. Raises DataError when a class has too few documents."""
        from modelyard.stages.classifier_run import train

        return train(ctx)
