"""Stage `reward`: preferences become a model that gives an answer a number, labelled steps one that does so by step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from modelyard.align.options import RewardOptions
from modelyard.planner.estimate import Estimate
from modelyard.stages.align import places
from modelyard.stages.alignment import (
    AlignmentOptions,
    check_alignment_stage,
    copy_facts,
    estimate_alignment,
    pack_preferences,
    pack_steps,
    page,
    prediction,
    prepared,
    result,
)
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.training import MODELS, clear, known_model, warnings
from modelyard.stages.training_report import RESULTS, write_results
from modelyard.storage import join


class RewardStageOptions(AlignmentOptions):
    """A reward model."""

    kind: Literal["reward"] = Field(description="stage kind")
    reward: RewardOptions = Field(RewardOptions(), description="what is scored, and constants of the loss")
    learning_rate: float = Field(1e-4, gt=0, description="peak rate (LoRA: 1e-4; full: 1e-5)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices")


class RewardStage(Stage[RewardStageOptions]):
    """See the module."""

    kind = "reward"
    Options = RewardStageOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=(*MODELS, "reward"), files=True),
        "data": InputSpec(kinds=("curate", "generate"), files=True),
    }

    def check(self, ctx: PlanContext[RewardStageOptions]) -> None:
        """Raises the errors of `check_alignment_stage`."""
        check_alignment_stage(ctx)

    def estimate(self, ctx: PlanContext[RewardStageOptions]) -> Estimate:
        """See `estimate_alignment`."""
        return estimate_alignment(ctx)

    def leaves(self, ctx: PlanContext[RewardStageOptions]) -> Mapping[str, Any] | None:
        """That of its base, with one number for the output layer."""
        return known_model(ctx)

    def run(self, ctx: StageContext[RewardStageOptions]) -> StageResult:
        """Packs the examples, trains on Ray Train workers, writes the classifier, held-out examples and report."""
        from modelyard.align.programs import RewardJob
        from modelyard.stages.workers import Assignment, run_workers

        options = ctx.options
        for warning in warnings(options):
            ctx.progress.say(f"[yellow]warning[/]: {warning}")
        clear(ctx, "model", "heldout.jsonl", "quarantine.jsonl", *RESULTS)
        process = options.reward.process is not None
        facts = prepared(ctx, pack_steps if process else pack_preferences)
        job = RewardJob(
            model="",
            data="",
            output=ctx.output,
            train=options.training(),
            adapter=options.adapter,
            reward=options.reward,
            checkpoints=join(ctx.work, "checkpoints"),
            reports=ctx.output,
        )
        steps = options.total_steps(facts["sequences"], 2 * options.sequence_length)
        estimate = prediction(ctx, steps)
        outcome = run_workers(
            ctx, Assignment("modelyard.align.programs:train_reward", job, places(ctx)), steps, estimate
        )
        copy_facts(ctx)
        title = "Process reward model" if process else "Reward model"
        write_results(ctx, outcome, page(ctx, outcome, facts, title), estimate)
        figures = outcome.figures
        of = " of steps" if process else ""
        shown = f"held-out accuracy{of} {figures['accuracy']:.1%}" if "accuracy" in figures else "nothing held out"
        return result(outcome, facts, shown)
