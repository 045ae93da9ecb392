"""The whole job of reinforcement learning for one worker: policy, engine, rewards, loop, and what comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from pydantic import Field
from safetensors.torch import save_file
from transformers import AutoTokenizer, PretrainedConfig

from modelyard import storage
from modelyard.align.environment import Telling
from modelyard.align.options import (
    PpoOptions,
    RolloutEngine,
    RolloutOptions,
    RolloutStops,
    TemplateName,
    check_apart,
    check_rollout_options,
)
from modelyard.align.policy import AnswerObjective, PolicyObjective
from modelyard.align.ppo import Ppo, PpoObjective, ValueHead
from modelyard.align.programs import PackedJob, check_alignment
from modelyard.align.rewards import RewardMix, mean_rewards
from modelyard.align.roles import Roles
from modelyard.align.rollouts import Rollouts
from modelyard.align.same_tokenizer import check_same_tokenizer, read_tokenizer
from modelyard.align.samples import Prompt, Prompts
from modelyard.align.scoring import RewardSetup
from modelyard.align.supply import Supply
from modelyard.align.weights import VALUE_HEAD
from modelyard.errors import RecipeError
from modelyard.models.build import check_shape
from modelyard.models.export import load_model, read_config
from modelyard.train.checkpoint import Row
from modelyard.train.hooks import Hooks
from modelyard.train.loop import Additions, Outcome
from modelyard.train.metrics import Say, Sink, no_say, no_sink
from modelyard.train.parallel.strategy import Strategy
from modelyard.train.programs import Setup, adapted, identify, run_loop, write_tuned, written
from modelyard.train.world import World

SHOWN_EVERY = 10
"""Steps between tables of answers."""


class ReinforceJob(PackedJob):
    """Learning from rewards of the model's own answers; `data` holds train.jsonl, and perhaps heldout.jsonl."""

    rollouts: RolloutOptions = Field(description="how answers are drawn and rewarded")
    reward_models: dict[str, str] = Field({}, description="local folders of reward models, by the names rewards use")
    after: tuple[int, ...] = Field((), description="token ids the chat template puts behind an answer")
    around: tuple[tuple[int, ...], tuple[int, ...]] = Field(
        ((), ()), description="token ids the chat template puts before and behind an observation of an environment"
    )
    template: TemplateName = Field("own", description="chat template of prompts that an environment's reset returns")
    ppo: PpoOptions | None = Field(None, description="PPO with a value head; null = advantages from groups")
    engine: RolloutEngine = Field(RolloutEngine(), description="the inference engine that answers")
    stops: RolloutStops = Field(RolloutStops(), description="when it has gone wrong")


def reinforce(
    job: ReinforceJob,
    world: World,
    sink: Sink = no_sink,
    say: Say = no_say,
    hooks: Hooks | None = None,
    roles: Roles | None = None,
) -> Outcome:
    """Trains a policy on rewards of its own answers and writes `model/` and, with an adapter, `adapter/`.

    `figures` of the outcome hold means over greedy answers to the held-out prompts: `reward` (without constraints) and
    each source's, after training, and before it as `before_*`. `roles` has whatever answers and scores; None = every
    worker does it itself, in turns with training.

    Raises:
        RecipeError: no reward, a reward model with another tokenizer, an adapter other than LoRA, or a layout that
            splits layers or sequences.
        DataError: rewards failed too often, or the model does not fit.
        DivergedError: losses stopped being numbers.
    """
    check_reinforce(job)
    source, options = Path(job.model), job.rollouts
    roles = roles or Roles()
    roles.check(options)
    _check_tokenizers(job)
    prompts = Prompts.read(Path(job.data) / "train.jsonl")
    held = Path(job.data) / "heldout.jsonl"
    heldout = Prompts.read(held).prompts if held.exists() else []
    telling = Telling(options.environment, *job.around, job.template) if options.environment is not None else None
    told, asked = (telling.longest, telling.options.prompt_tokens) if telling is not None else (0, 0)
    longest = max(asked, *(len(p.ids) for p in [*prompts.prompts, *heldout])) + options.max_tokens + told
    plain = load_model(source)
    _check_length(plain.config, longest)
    config = read_config(source)
    ppo = Ppo(job.ppo, options.kl) if job.ppo is not None else None
    heads = {VALUE_HEAD: ValueHead(int(config.get_text_config().hidden_size))} if ppo is not None else {}
    strategy = adapted(plain, job.adapter, job.train, world, more=heads)
    threads = torch.get_num_threads()
    settings = job.engine.model_copy(update={"max_length": longest, "threads": job.engine.threads or threads})
    pool = roles.pool(source, settings, telling, world.leads)
    reference = roles.reference(source, settings) if options.kl and job.adapter.full else None
    torch.set_num_threads(threads)
    objective = _objective(job)
    setup = RewardSetup(str(world.device), longest + len(job.after))
    mix = RewardMix(options, roles.reward_models(job.reward_models, setup))
    pad = AutoTokenizer.from_pretrained(str(source), local_files_only=True).pad_token_id or 0
    steps = job.train.total_steps(len(prompts), longest * options.group)
    rollouts = Rollouts(
        strategy, Supply(pool, strategy, options, job.train.seed), prompts, objective, mix, options,
        job.train.global_batch, -(-steps // options.updates), job.train.micro_batch or 16, job.train.seed, pad,
        job.after, reference, ppo,
    )  # fmt: skip
    before = _measured(rollouts, heldout, world, 0)
    table = _Table(rollouts, job.reports, world)
    kept = {f"multiplier.{name}": multiplier.state for name, multiplier in mix.multipliers.items()}
    kept |= {"kl_weight": ppo.controller.state} if ppo is not None else {}
    additions = Additions(lambda _: rollouts, table.figures, kept, lambda rows: end_reason(job.stops, rows))
    identity = identify(config, objective, job.adapter)
    loop = Setup(
        job.train, objective, identity, job.checkpoints, longest * options.group, job.reports, source, additions
    )
    try:
        outcome = run_loop(loop, strategy, prompts, None, sink, say, hooks)
        after = _measured(rollouts, heldout, world, outcome.steps)
    finally:
        mix.close()
        if pool is not None:
            pool.close()
    _write(job, strategy, config)
    return replace(outcome, figures={f"before_{name}": value for name, value in before.items()} | after)


def _objective(job: ReinforceJob) -> AnswerObjective:
    options = job.rollouts
    return PolicyObjective(options, options.max_tokens) if job.ppo is None else PpoObjective(options, job.ppo)


def _write(job: ReinforceJob, strategy: Strategy, config: PretrainedConfig) -> None:
    """`model/`, with an adapter `adapter/`, and `value_head.safetensors` of PPO. All workers call it together."""
    state = strategy.full_state(trainable_only=not job.adapter.full)
    if strategy.world.leads:
        with written(job.output) as target:
            values = {name: state.pop(name) for name in list(state) if name.startswith(f"{VALUE_HEAD}.")}
            if values:
                save_file(values, target / "value_head.safetensors")
            write_tuned(Path(job.model), job.adapter, job.train.seed, config, state, target)
    strategy.world.barrier()


def check_reinforce(job: ReinforceJob) -> None:
    """Raises RecipeError for what rollouts cannot do."""
    check_alignment(job.train, job.adapter, None)
    if job.adapter.ia3 is not None:
        raise RecipeError("rollouts need LoRA or full training", place="adapter", mend="give lora, or lora: null")
    if job.train.parallel.tensor > 1:
        raise RecipeError("rollouts need whole layers on a worker (or sharded ones)", place="parallel.tensor",
                          mend="use shard or data degrees")  # fmt: skip
    check_rollout_options(job.rollouts, job.ppo)
    check_apart(job.rollouts, job.adapter.full)
    if job.train.tokens is not None:
        raise RecipeError("answers have no length known beforehand", place="tokens", mend="give steps or epochs")
    if job.rollouts.kl and job.adapter.full and job.rollouts.temperature != 1.0:
        raise RecipeError("the reference engine scores at temperature 1", place="rollouts.temperature",
                          mend="use temperature 1, or an adapter")  # fmt: skip


def _check_length(config: PretrainedConfig, longest: int) -> None:
    check_shape(config, None)
    most = getattr(config, "max_position_embeddings", None)
    if most and longest > most:
        raise RecipeError(
            f"prompt and answer have up to {longest:,} tokens with what they are told, the model takes {most:,}",
            place="rollouts.max_tokens",
            mend="lower it, sequence_length, or turns and observation_tokens of rollouts.environment",
        )


def _check_tokenizers(job: ReinforceJob) -> None:
    for name, folder in job.reward_models.items():
        check_same_tokenizer(read_tokenizer(Path(job.model)), read_tokenizer(Path(folder)), name)


def _measured(rollouts: Rollouts, prompts: Sequence[Prompt], world: World, version: int) -> dict[str, float]:
    """Means over greedy answers to held-out prompts, which workers share, by weights that get the number `version`: the
    weighted sum as `reward`, and each source's; nothing without prompts."""
    if not prompts:
        return {}
    answers = rollouts.greedy(prompts, version)
    rewards = rollouts.rewarded(answers) if answers else None
    parts = world.gather(float(rewards.plain.sum()) if rewards is not None else 0.0)
    return {"reward": sum(parts) / len(prompts)} | mean_rewards(rewards, len(answers), world)


class _Table:
    """Figures of every step, and now and then some answers with their rewards for people."""

    def __init__(self, rollouts: Rollouts, reports: str | None, world: World) -> None:
        self._rollouts, self._reports, self._world = rollouts, reports, world

    def figures(self) -> dict[str, float]:
        """See `Rollouts.figures`."""
        number = self._rollouts.number
        if self._world.leads and self._reports is not None and number % SHOWN_EVERY == 0:
            rows = [{**row, "text": f"[{row['reward']:g}] {row['text']}"} for row in self._rollouts.shown]
            place = storage.join(self._reports, "samples", f"step-{number + 1:08d}.json")
            storage.write_bytes(place, json.dumps(rows, ensure_ascii=False, indent=1).encode())
        return self._rollouts.figures()


def end_reason(stops: RolloutStops, history: Sequence[Row]) -> str:
    """Why to end after these steps, by means over the last window; empty = go on."""
    if len(history) < stops.window:
        return ""

    def mean(name: str, rows: Sequence[Row]) -> float:
        return fmean(row[name] for row in rows if name in row) if any(name in row for row in rows) else 0.0

    last, first = history[-stops.window :], history[: stops.window]
    kl, repetition = mean("kl", last), mean("repetition", last)
    if stops.kl is not None and kl > stops.kl:
        return f"the KL divergence from the reference is {kl:.3f} nats a token, above {stops.kl:g}"
    if stops.length is not None and mean("answer_tokens", last) > stops.length * max(1.0, mean("answer_tokens", first)):
        return f"answers have grown {mean('answer_tokens', last) / max(1.0, mean('answer_tokens', first)):.1f} times"
    if stops.repetition is not None and repetition > stops.repetition:
        return f"{repetition:.0%} of the 4-grams of answers repeat"
    if stops.reward is not None and mean("reward", last) >= stops.reward:
        return f"the mean reward is {mean('reward', last):.3f}"
    return ""
