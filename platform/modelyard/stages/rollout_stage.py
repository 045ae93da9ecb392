"""The part of stage `align` that learns from rewards of its own answers (`method: grpo` and `ppo`)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelyard.align.options import PpoOptions, check_apart, check_rollout_options
from modelyard.engine import choose
from modelyard.errors import DataError, RecipeError
from modelyard.stages.alignment import Facts, prepared
from modelyard.stages.base import PlanContext, StageContext, StageResult
from modelyard.stages.examples import name_of, read_examples, split
from modelyard.stages.finetune import read_tokenizer
from modelyard.stages.roles import ENGINES, Role, placed, roles_apart, roles_need
from modelyard.stages.rollout_plan import predicted_rollouts
from modelyard.stages.rollout_rewards import check_rewards, check_same_tokenizers, reward_models
from modelyard.stages.training import model_place, speed_metrics
from modelyard.stages.training_report import write_results
from modelyard.storage import join, read_bytes, write_bytes

if TYPE_CHECKING:
    from modelyard.align.reinforce import ReinforceJob
    from modelyard.stages.align import AlignOptions
    from modelyard.stages.train_worker import Place
    from modelyard.train.loop import Outcome
    from modelyard.train.report import Page

Places = dict[str, "Place | dict[str, Place]"]
"""Fields of a job and what they should hold the local path of."""

CURVES = ("reward", "kl", "kl_answer", "kl_weight", "value_loss", "explained_variance", "entropy", "clip_fraction",
          "answer_tokens", "repetition", "engine_difference_max", "staleness_mean", "importance_weight_mean",
          "importance_clipped", "turns")  # fmt: skip
PHASES = ("sync", "generate", "reward", "score")


def check_rollouts(ctx: PlanContext[AlignOptions]) -> None:
    """Raises RecipeError for what rollouts cannot do, before any worker starts."""
    options = ctx.options
    check_rewards(ctx)
    check_rollout_options(options.rollouts, ppo_options(options))
    check_apart(options.rollouts, options.adapter.full)
    _check_engine(ctx)
    if options.parallel.tensor > 1:
        raise RecipeError("rollouts need whole layers on a worker", place="parallel.tensor", mend="use shard or data")
    if options.adapter.ia3 is not None:
        raise RecipeError("rollouts need LoRA or full training", place="adapter", mend="give lora, or lora: null")
    if options.tokens is not None:
        raise RecipeError("answers have no length known beforehand", place="tokens", mend="give steps or epochs")
    if options.checkpoint_every % options.rollouts.updates:
        raise RecipeError(
            "a checkpoint between two updates of one set of answers could not be resumed exactly",
            place="checkpoint_every",
            mend=f"make it a multiple of rollouts.updates ({options.rollouts.updates})",
        )


def _check_engine(ctx: PlanContext[AlignOptions]) -> None:
    """Raises RecipeError or ResourceError for an engine that cannot answer where it would be."""
    options = ctx.options
    apart, gpus = options.rollouts.engines, options.resources.gpus_per_worker
    choose.check(options.engine, apart.gpus if apart.count else gpus, here=ctx.here)
    if options.engine.backend == "vllm" and gpus and not apart.count:
        raise RecipeError("vLLM takes the memory of a GPU for itself, and the trainer needs it", place="engine.backend",
                          mend="give rollouts.engines, such as {count: 1, gpus: 1}, or use native")  # fmt: skip


def ppo_options(options: AlignOptions) -> PpoOptions | None:
    """The constants of PPO where that is the method."""
    return options.ppo if options.method == "ppo" else None


def run_rollouts(ctx: StageContext[AlignOptions]) -> StageResult:
    """Encodes the prompts, trains on Ray Train workers, which answer and score themselves or ask actors, writes model
    and report."""
    from modelyard.align.reinforce import ReinforceJob
    from modelyard.stages.workers import Assignment, run_workers

    options = ctx.options
    check_same_tokenizers(ctx.inputs, reward_models(options))
    facts = prepared(ctx, pack_prompts)
    job = ReinforceJob(
        model="",
        data="",
        output=ctx.output,
        train=options.training(),
        adapter=options.adapter,
        rollouts=options.rollouts,
        ppo=ppo_options(options),
        engine=options.engine,
        stops=options.stops,
        after=facts["after"],
        around=facts.get("around", ((), ())),
        template=options.examples.template,
        checkpoints=join(ctx.work, "checkpoints"),
        reports=ctx.output,
    )
    brought: dict[str, Place] = {
        name: model_place(ctx.inputs[name], name) for name in ("model", *reward_models(options))
    }
    apart = roles_apart(options, brought)
    places: Places = {"model": brought.pop("model"), "data": join(ctx.work, "answers")}
    places["reward_models"] = brought if not options.rollouts.reward_models.count else {}
    steps = options.total_steps(facts["prompts"], 1)
    if apart:
        outcome = _run_apart(ctx, job, places, steps, _with_calls(apart, options, facts["heldout_prompts"]))
    else:
        outcome = run_workers(ctx, Assignment("modelyard.align.reinforce:reinforce", job, places), steps)
    write_bytes(join(ctx.output, "quarantine.jsonl"), read_bytes(join(ctx.work, "answers", "quarantine.jsonl")))
    estimate = predicted_rollouts(ctx, steps, facts["longest_prompt"])
    write_results(ctx, outcome, _page(ctx, outcome, facts), estimate)
    return _result(outcome, facts)


def _with_calls(roles: Sequence[Role], options: AlignOptions, heldout: int) -> list[Role]:
    """The roles, with the calls that an engine may have open at a time: the prompts of all sets it may be asked for."""
    sets = options.rollouts.staleness + 1 + options.rollouts.dynamic_sampling
    more = {"max_concurrency": sets * options.global_batch + heldout + 16}
    return [replace(role, more=more) if role.name == ENGINES else role for role in roles]


def _run_apart(
    ctx: StageContext[AlignOptions], job: ReinforceJob, places: Places, steps: int, roles: Sequence[Role]
) -> Outcome:
    """The workers, with the actors of `roles` beside them in a placement group of their own."""
    from modelyard.stages.rollout_roles import ApartJob
    from modelyard.stages.workers import Assignment, await_room, run_workers

    options = ctx.options
    await_room(options.resources, options.workers_timeout, roles_need(roles))
    with placed(roles, options.workers_timeout) as names:
        apart = ApartJob(**{name: getattr(job, name) for name in type(job).model_fields}, actors=names)
        return run_workers(ctx, Assignment("modelyard.stages.rollout_roles:reinforce", apart, places), steps)


def pack_prompts(ctx: StageContext[Any], folder: Path) -> Facts:
    """Tasks as token ids in `train.jsonl` and `heldout.jsonl`; prompts longer than `sequence_length` are left out.

    Raises:
        DataError: records cannot be used, or no prompt is left.
    """
    from modelyard.align.encode import after_answer, around_observation, use_template
    from modelyard.align.records import task
    from modelyard.train.pairs import render

    options: AlignOptions = ctx.options
    data = ctx.inputs["data"]
    examples = read_examples(data, task, options.examples.bad_rows)
    tokenizer = use_template(read_tokenizer(ctx.inputs["model"]), options.examples.template)
    kept, held = split(examples.good, options.heldout)
    facts: Facts = {"quarantined": len(examples.bad), "truncated": 0, "dropped": 0, "heldout_prompts": 0,
                    "longest_prompt": 0, "after": after_answer(tokenizer), "around": ((), ())}  # fmt: skip
    environment = options.rollouts.environment
    if environment is not None and environment.form == "chat":
        facts["around"] = around_observation(tokenizer, environment.role)
    (folder / "quarantine.jsonl").write_bytes(examples.quarantine())
    for name, part in (("train", kept), ("heldout", held)):
        lines = []
        for example in part:
            text = render(tokenizer, example.prompt, generate=True)
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            if len(ids) > options.sequence_length:
                facts["dropped"] += 1
                continue
            facts["longest_prompt"] = max(facts["longest_prompt"], len(ids))
            lines.append(json.dumps({"ids": ids, "text": text, "row": example.row, "place": example.place}))
        if lines:
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        facts["prompts" if name == "train" else "heldout_prompts"] = len(lines)
    if not facts["prompts"]:
        raise DataError("no prompt is left to answer", place=name_of(data), mend="raise sequence_length, or give more")
    return facts


def _result(outcome: Outcome, facts: Facts) -> StageResult:
    rewards = [row["reward"] for row in outcome.history if "reward" in row]
    first, last = _mean(rewards[:5]), _mean(rewards[-5:])
    figures = {f"heldout_{name}": value for name, value in outcome.figures.items()}
    shown = f"reward {first:.3f} -> {last:.3f}" + (
        f", held out {figures['heldout_before_reward']:.3f} -> {figures['heldout_reward']:.3f}" if figures else ""
    )
    return StageResult(
        summary=f"{outcome.steps:,} steps on {facts['prompts']:,} prompts, {shown}",
        counts={
            "parameters": outcome.parameters,
            "trainable": outcome.trainable,
            "steps": outcome.steps,
            **{name: int(facts[name]) for name in ("prompts", "heldout_prompts", "dropped", "quarantined")},
        },
        metrics={"loss": outcome.loss, "reward": last, "first_reward": first, **speed_metrics(outcome), **figures},
    )


def curve_names(history: Sequence[Mapping[str, float]]) -> list[str]:
    """What the report draws: the usual curves that there are, then each source's reward and each multiplier."""
    known = dict.fromkeys(name for row in history for name in row)
    return [n for n in CURVES if n in known] + [n for n in known if n.startswith(("reward/", "multiplier/"))]


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def _page(ctx: StageContext[Any], outcome: Outcome, facts: Facts) -> Page:
    from modelyard.train.report import Line, Page, Table

    history = outcome.history
    rows = [
        ("prompts", f"{facts['prompts']:,}, {facts['heldout_prompts']:,} more held out"),
        ("left out, longer than sequence_length", f"{facts['dropped']:,}"),
        ("quarantined records", f"{facts['quarantined']:,}"),
        ("trained", f"{outcome.trainable:,} of {outcome.parameters:,} parameters, {outcome.steps:,} steps"),
        *[(f"held-out {n.replace('_', ' ')} (greedy answers)", f"{v:.4f}") for n, v in outcome.figures.items()],
        ("time", f"{outcome.seconds:.0f} s"),
        ("counted in predictions", "the longest prompt, answers of max_tokens; no functions and judges"),
        *([("ended early", outcome.stopped)] if outcome.stopped else []),
    ]
    plots = []
    for name in curve_names(history):
        points = [(row["step"], row[name]) for row in history if name in row]
        if points:
            title = f"{name.replace('_', ' ').capitalize()}, by step"
            plots.append((title, [Line(name.replace("_", " "), points)]))
    total = sum(row["seconds"] for row in history) or 1.0
    spent = [(p, sum(row.get(f"{p}_seconds", 0.0) for row in history)) for p in PHASES]
    spent.append(("train", total - sum(seconds for _, seconds in spent)))
    shares = [(name, f"{seconds:.1f} s", f"{seconds / total:.0%}") for name, seconds in spent]
    table = Table("Where the time went", ("phase", "seconds", "share"), shares)
    method = ctx.options.method if ctx.options.method == "ppo" else ctx.options.rollouts.variant
    return Page(f"{method.upper()}: {ctx.name}", rows, plots, tables=(table,))
