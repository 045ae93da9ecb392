"""What `plan` says of reinforcement learning: training, answers and scores of every set, at their most."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from modelyard.errors import ModelyardError
from modelyard.planner import formatting as fmt
from modelyard.planner.estimate import Estimate
from modelyard.stages.base import PlanContext, StageContext
from modelyard.stages.roles import roles_apart, roles_need
from modelyard.stages.rollout_rewards import reward_models
from modelyard.stages.training import (
    Config,
    known_model,
    one_step,
    planned_device,
    planned_precision,
    predict,
    warnings,
)

if TYPE_CHECKING:
    from modelyard.planner.rollouts import AnswerSet
    from modelyard.stages.align import AlignOptions

_WORDS = {"float32": "fp32", "float16_packed": "fp16", "bfloat16": "bf16", "int8": "int8"}


def estimate_rollouts(ctx: PlanContext[AlignOptions]) -> Estimate:
    """Parameters, memory of a worker and time, counted with prompts of `sequence_length` and answers of `max_tokens`.

    Raises:
        ResourceError: the trainer alone does not fit; names the knob to turn.
    """
    options, config = ctx.options, known_model(ctx)
    roles = roles_apart(options)
    need = " and ".join(f"{amount:g} {name}" for name, amount in roles_need(roles).items())
    beside = (f"beside the trainers {need}: {', '.join(map(str, roles))}",) if roles else ()
    if config is None:
        return Estimate(notes=("size and time are known once its inputs are", *beside, *warnings(options)))
    found = _steps(ctx, config)
    counted = "; further rounds (dynamic_sampling) are not" if options.rollouts.dynamic_sampling else ""
    most = (
        f"counted at the most: prompts of {options.sequence_length:,} tokens and answers of "
        f"{options.rollouts.max_tokens:,}{counted}; no held-out answers, no time of functions and judges"
    )
    return replace(found, notes=(*found.notes, most, *beside))


def predicted_rollouts(ctx: StageContext[AlignOptions], steps: int, prompt: int) -> Estimate | None:
    """The same for a run of `steps` that begins now, with prompts of `prompt` tokens at most; None where the planner
    has no answer."""
    options = ctx.options.model_copy(update={"steps": steps, "sequence_length": prompt})
    try:
        return estimate_rollouts(PlanContext(ctx.name, options, ctx.recipe, ctx.root, ctx.inputs, {}))
    except ModelyardError:
        return None


def _steps(ctx: PlanContext[AlignOptions], config: Config) -> Estimate:
    """The estimate of all steps, or of one where their number follows from data that are not there yet."""
    from modelyard.planner.rollouts import set_flops

    options, asked = ctx.options, _asked(ctx.options)
    length = options.rollouts.rows
    rows = max(1, -(-asked.tokens // length))
    steps = options.steps or 1
    training = predict(
        options.model_copy(update={"global_batch": rows}), config, steps * rows * length, length, options.adapter,
        ctx.root,
    )  # fmt: skip
    assert training.seconds is not None
    scorers = _scorers(ctx, config)
    writing, scoring = _set_seconds(ctx, config, scorers, asked)
    sets = -(-steps // options.rollouts.updates)
    train = training.seconds / sets
    # Engines apart that may run ahead write while the others score and train.
    ahead = bool(options.rollouts.engines.count and options.rollouts.staleness)
    more = max(scoring, writing - train) if ahead else writing + scoring
    held = _beside_bytes(ctx, config, asked)
    parts = (("writing", writing), ("scoring", scoring), ("training", train))
    shown = ", ".join(f"{name} {fmt.duration(seconds)}" for name, seconds in parts if seconds)
    total = replace(
        training.longer(sets * more, sets * set_flops(config, scorers, asked)),
        memory_bytes=(training.memory_bytes or 0) + int(sum(size for _, size in held)),
        memory_parts=(*training.memory_parts, *held),
        notes=(
            *training.notes,
            f"a set of {asked.answers:,} answers: {shown}{' while the next is written' if ahead else ''}",
        ),
        basis=None,
    )
    return total if options.steps else one_step(total, "how many there are is known once the prompts are read")


def _asked(options: AlignOptions) -> AnswerSet:
    from modelyard.planner.rollouts import AnswerSet

    rollouts = options.rollouts
    told = rollouts.environment
    more = 0 if told is None else (told.turns - 1) * told.observation_tokens
    prompt = max(options.sequence_length, 0 if told is None else told.prompt_tokens)
    return AnswerSet(options.global_batch, rollouts.group, prompt, rollouts.max_tokens + more,
                     options.engine.max_sequences)  # fmt: skip


def _scorers(ctx: PlanContext[AlignOptions], config: Config) -> list[Config]:
    """The configuration of the model of every forward pass over a set, reward models as large as the policy where they
    are not known yet."""
    options = ctx.options
    own = int(options.rollouts.updates > 1 or options.method == "ppo") + int(options.rollouts.kl > 0)
    return [config] * own + [known_model(ctx, name) or config for name in reward_models(options)]


def _set_seconds(
    ctx: PlanContext[AlignOptions], config: Config, scorers: list[Config], asked: AnswerSet
) -> tuple[float, float]:
    """Seconds of writing and of scoring a set."""
    from modelyard.planner.rollouts import scoring_seconds, writing_seconds

    options, hw = ctx.options, planned_device(ctx.options, ctx.root)
    engines = options.rollouts.engines
    place = planned_device(options, ctx.root, engines.cpus) if engines.count else hw
    return (
        writing_seconds(config, asked, place, engines.count or options.resources.workers, _dtype(options)),
        scoring_seconds(scorers, asked, hw, options.resources.workers, planned_precision(options)),
    )


def _beside_bytes(ctx: PlanContext[AlignOptions], config: Config, asked: AnswerSet) -> list[tuple[str, float]]:
    """What a worker holds besides training, by component: roles that no actors play."""
    from modelyard.planner.rollouts import engine_bytes, weights_bytes

    options, hw = ctx.options, planned_device(ctx.options, ctx.root)
    rollouts, held = options.rollouts, list[tuple[str, float]]()
    if not rollouts.engines.count:
        held.append(("engine", engine_bytes(config, asked, hw.kind, _dtype(options))))
    if options.adapter.full and rollouts.kl and not rollouts.reference.count:
        held.append(("reference", weights_bytes(config)))
    if not rollouts.reward_models.count and reward_models(options):
        models = [known_model(ctx, name) or config for name in reward_models(options)]
        held.append(("reward models", sum(map(weights_bytes, models))))
    return held


def _dtype(options: AlignOptions) -> str:
    """Of the engine's weights in the planner's words."""
    return _WORDS[options.engine.precision]
