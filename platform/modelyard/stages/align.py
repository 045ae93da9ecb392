"""Stage `align`: a model learns from preferences, from opinions, or from rewards of its own answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from modelyard.align.options import PpoOptions, PreferenceOptions, RolloutEngine, RolloutOptions, RolloutStops
from modelyard.errors import RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.stages.alignment import (
    AlignmentOptions,
    check_alignment_stage,
    copy_facts,
    estimate_alignment,
    pack_feedback,
    pack_preferences,
    page,
    prediction,
    prepared,
    result,
)
from modelyard.stages.base import InputSpec, PlanContext, Stage, StageContext, StageResult
from modelyard.stages.roles import REWARDED, roles_apart, roles_need
from modelyard.stages.rollout_plan import estimate_rollouts
from modelyard.stages.rollout_rewards import check_no_more
from modelyard.stages.rollout_stage import check_rollouts, run_rollouts
from modelyard.stages.training import MODELS, clear, known_model, model_place, warnings
from modelyard.stages.training_report import RESULTS, write_results
from modelyard.storage import Artifact, join

if TYPE_CHECKING:
    from modelyard.train.loop import Outcome


class AlignOptions(AlignmentOptions):
    """Preference optimization (dpo, ipo, kto, orpo, simpo), or reinforcement learning (grpo and its variants, ppo)."""

    kind: Literal["align"] = Field(description="stage kind")
    method: Literal["dpo", "ipo", "kto", "orpo", "simpo", "grpo", "ppo"] = Field(
        "dpo",
        description="dpo, ipo: preferences and a reference; kto: opinions; orpo, simpo: no reference; grpo: rewards of "
        "the model's own answers (rollouts.variant says which kind); ppo: the same with a learned value function",
    )
    rollouts: RolloutOptions = Field(RolloutOptions(), description="for grpo, ppo: how answers are drawn and rewarded")
    engine: RolloutEngine = Field(RolloutEngine(), description="for grpo, ppo: the inference engine")
    stops: RolloutStops = Field(RolloutStops(), description="for grpo, ppo: when it has gone wrong")
    ppo: PpoOptions = Field(PpoOptions(), description="for ppo: advantages, value function and KL control")
    preference: PreferenceOptions = Field(PreferenceOptions(), description="constants of the preference losses")
    learning_rate: float = Field(
        5e-5, gt=0, description="peak rate (DPO with LoRA of small models: 5e-5; full: 5e-7 to 5e-6)"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices (DPO: 0)")


class AlignStage(Stage[AlignOptions]):
    """See the module."""

    kind = "align"
    Options = AlignOptions
    inputs: ClassVar[Mapping[str, InputSpec]] = {
        "model": InputSpec(kinds=MODELS, files=True),
        "data": InputSpec(kinds=("curate", "generate"), files=True),
    }
    more = InputSpec(kinds=("reward",), files=True)
    """Reward models, by the names that `rollouts.rewards` uses."""

    def check(self, ctx: PlanContext[AlignOptions]) -> None:
        """Raises the errors of `check_alignment_stage`, and RecipeError for a reference that cannot be had."""
        check_alignment_stage(ctx)
        options = ctx.options
        if options.method in REWARDED:
            check_rollouts(ctx)
            return
        check_no_more(options)
        if options.preference.reference == "adapter" and options.adapter.full:
            raise RecipeError(
                "there is no adapter to switch off",
                place="preference.reference",
                mend="use reference: precomputed, or train an adapter",
            )

    def estimate(self, ctx: PlanContext[AlignOptions]) -> Estimate:
        """By the planner: see `estimate_rollouts` and `estimate_alignment`."""
        if ctx.options.method in REWARDED:
            return estimate_rollouts(ctx)
        return estimate_alignment(ctx, ctx.options.method not in ("orpo", "simpo"))

    def leaves(self, ctx: PlanContext[AlignOptions]) -> Mapping[str, Any] | None:
        """That of its base."""
        return known_model(ctx)

    def demand(self, options: AlignOptions) -> dict[str, float]:
        """Of the trainers, and of the actors that play roles apart."""
        demand = super().demand(options)
        for name, amount in roles_need(roles_apart(options)).items():
            demand[name] = demand.get(name, 0.0) + amount
        return demand

    def run(self, ctx: StageContext[AlignOptions]) -> StageResult:
        """Packs the examples, trains on Ray Train workers, writes model, adapter, held-out examples and report."""
        from modelyard.align.programs import PreferenceJob
        from modelyard.stages.workers import Assignment, run_workers

        options = ctx.options
        for warning in warnings(options):
            ctx.progress.say(f"[yellow]warning[/]: {warning}")
        clear(ctx, "model", "adapter", "heldout.jsonl", "quarantine.jsonl", *RESULTS)
        if options.method in REWARDED:
            return run_rollouts(ctx)
        facts = prepared(ctx, pack_feedback if options.method == "kto" else pack_preferences)
        job = PreferenceJob(
            model="",
            data="",
            output=ctx.output,
            train=options.training(),
            adapter=options.adapter,
            method=options.method,
            preference=options.preference,
            checkpoints=join(ctx.work, "checkpoints"),
            reports=ctx.output,
        )
        steps = options.total_steps(facts["sequences"], 2 * options.sequence_length)
        estimate = prediction(ctx, steps)
        assignment = Assignment("modelyard.align.programs:prefer", job, places(ctx))
        outcome = run_workers(ctx, assignment, steps, estimate)
        copy_facts(ctx)
        write_results(ctx, outcome, page(ctx, outcome, facts, options.method.upper()), estimate)
        return result(outcome, facts, _shown(outcome))


def places(ctx: StageContext[Any]) -> dict[str, tuple[Artifact, str] | str]:
    """The model and the packed examples, for the workers to bring."""
    return {"model": model_place(ctx.inputs["model"], "model"), "data": join(ctx.work, "answers")}


def _shown(outcome: Outcome) -> str:
    figures = outcome.figures
    if "accuracy" not in figures:
        return "nothing held out"
    if "prefers" not in figures:
        return f"held-out accuracy {figures['accuracy']:.1%}"
    return (
        f"held-out accuracy {figures['accuracy']:.1%}; the preferred answer is the likelier one in "
        f"{figures['prefers']:.1%} (before {figures['before_prefers']:.1%})"
    )
