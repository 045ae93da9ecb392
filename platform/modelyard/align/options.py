"""Options of data and methods of alignment. Light: read by `plan` without torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from modelyard.align.reward_options import RewardSource
from modelyard.engine.options import EngineOptions, Precision
from modelyard.errors import RecipeError
from modelyard.recipe.schema import Options, runtime

TemplateName = Literal["own", "chatml", "zephyr", "plain"]


class ExampleOptions(Options):
    """How records become token sequences."""

    form: Literal["auto", "messages", "pairs", "alpaca", "sharegpt", "hh"] = Field(
        "auto", description="form of instruction records; auto = by their fields, record by record"
    )
    template: TemplateName = Field(
        "own", description="chat template: the tokenizer's own, or one by name where it has none (plain: Q and A lines)"
    )
    learn: Literal["last", "turns", "all"] = Field(
        "last", description="what is learnt: the last answer, every answer of a conversation, or prompts too"
    )
    long: Literal["cut", "drop"] = Field(
        "cut", description="records longer than sequence_length: cut at their end, or left out; counted either way"
    )
    bad_rows: float = Field(
        0.01, ge=0, lt=1, description="share of records that may be unusable; they go to quarantine.jsonl with reasons"
    )


class PreferenceOptions(Options):
    """Constants of the preference losses; null = the paper's own."""

    beta: float | None = Field(
        None, gt=0, description="strength of the pull to the reference (DPO, IPO, KTO: 0.1; ORPO: 0.1; SimPO: 2)"
    )
    gamma: float = Field(1.0, ge=0, description="SimPO's target margin of rewards (arXiv 2405.14734: 0.5 to 1.5)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="share of labels taken to be wrong (conservative DPO, Mitchell 2023)"
    )
    sft: float = Field(
        0.0, ge=0, description="weight of the chosen answer's cross-entropy beside DPO (RPO, arXiv 2404.19733)"
    )
    desirable: float = Field(1.0, ge=0, description="KTO's weight of liked answers (arXiv 2402.01306)")
    undesirable: float = Field(1.0, ge=0, description="KTO's weight of disliked answers")
    reference: Literal["precomputed", "adapter"] = Field(
        "precomputed",
        description="the model before training: its log-probabilities once, or the adapter switched off in every step",
    )


class ProcessOptions(Options):
    """A process reward model: every step of an answer has a score (Uesato et al. 2022, arXiv 2211.14275; Lightman et
    al. 2023, 2305.20050)."""

    separator: str = Field("\n", min_length=1, description="what stands between two steps of an answer")


class RewardOptions(Options):
    """A reward model: Bradley-Terry on pairs, or with `process` cross-entropy on labelled steps."""

    process: ProcessOptions | None = Field(
        None, description="score the steps of answers, from records with steps and labels; null = whole answers"
    )
    center: float = Field(
        0.0, ge=0, description="weight of the squared sum of both rewards, which keeps their mean at 0 (arXiv "
        "2312.09244: 0.01)"
    )  # fmt: skip

    @model_validator(mode="after")
    def _of_pairs(self) -> RewardOptions:
        if self.process is not None and self.center:
            raise ValueError("center is of pairs; a process reward model learns from labelled steps")
        return self


class RolloutEngine(EngineOptions):
    """The engine that answers: in single precision, so that its log-probabilities are the trainer's."""

    precision: Precision = Field("float32", description="as of the engine; less is faster, and its gap is reported")


class ActorGroup(Options):
    """A role that Ray actors play apart from the trainers, in a placement group with those of the other roles."""

    count: int = Field(0, ge=0, description="how many; 0 = none: every trainer plays the role itself, in turns")
    cpus: float = Field(1.0, gt=0, description="CPU cores of each")
    gpus: float = Field(0.0, ge=0, description="GPUs of each; parts of one let several share it")
    restarts: int = Field(3, ge=0, description="how often one that died is started again")
    answer_timeout: float = Field(1800.0, gt=0, description="seconds without any answer after which the run fails")


class EngineGroup(ActorGroup):
    """Engines apart from the trainers."""

    sync_timeout: float = Field(
        300.0,
        gt=0,
        description="seconds until all must have new weights, or one that starts must have loaded the model",
    )


class ScorerGroup(ActorGroup):
    """Models that score answers, apart from the trainers: the reference, or reward models."""

    start_timeout: float = Field(300.0, gt=0, description="seconds until all must have loaded their model")


class EnvironmentOptions(Options):
    """What answers are told while they are written: an episode of several turns."""

    function: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.\w+)*:[A-Za-z_]\w*$",
        description="package.module:name, run in a process apart: a function(prompt, answer, row) -> observation, or "
        "None at the end; or a class with reset(row) -> None or a prompt (text or messages) in place of the row's, and "
        "step(answer) -> (observation, done, reward)",
    )
    turns: int = Field(4, ge=1, description="turns of the policy in an episode at most")
    form: Literal["chat", "plain"] = Field(
        "chat", description="chat: an observation is a message of its own, by the chat template; plain: its text alone "
        "goes on in the answer, after one of `stop`"
    )  # fmt: skip
    role: str = Field("user", min_length=1, description="for chat: who the observation comes from (user, tool, ...)")
    stop: tuple[str, ...] = Field(
        (), max_length=16, description="strings that end a turn, such as </tool>, beside the end token"
    )
    prompt_tokens: int = Field(
        0, ge=0, description="tokens of a prompt that `reset` returns at most; 0 = as the longest of the data"
    )
    observation_tokens: int = Field(128, ge=1, description="tokens of an observation at most; longer ones are cut")
    timeout: float = Field(5.0, gt=0, description="seconds the function may take for one turn")


class RolloutOptions(Options):
    """How a policy is sampled and its gradient is taken (GRPO, arXiv 2402.03300)."""

    variant: Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce++"] = Field(
        "grpo",
        description="advantages and averaging: grpo; dr_grpo without deviation and length (arXiv 2503.20783); dapo by "
        "token, clip higher (2503.14476); rloo leave-one-out (2402.14740); reinforce++ batch baseline (2501.03262)",
    )
    group: int = Field(8, ge=1, description="answers to each prompt (DeepSeekMath: 64; small models: 8; PPO needs no "
                       "groups: 1)")  # fmt: skip
    max_tokens: int = Field(128, ge=1, description="tokens of an answer at most")
    temperature: float = Field(1.0, gt=0, description="of sampling; the policy is the distribution at it")
    clip: float = Field(0.2, gt=0, lt=1, description="how far below 1 a probability ratio counts (PPO)")
    clip_high: float | None = Field(
        None, gt=0, description="how far above 1; null = clip, for dapo 0.28 (clip higher, arXiv 2503.14476)"
    )
    kl: float = Field(0.0, ge=0, description="weight of the KL divergence from the model before training (GRPO: 0.04)")
    unbiased_kl: bool = Field(
        False, description="times the probability ratio, whose gradient is the divergence's own (arXiv 2512.02556)"
    )
    updates: int = Field(1, ge=1, description="optimizer steps on each set of answers")
    dynamic_sampling: int = Field(
        0, ge=0, description="further rounds to replace groups whose rewards are all equal (DAPO); 0 = keep them"
    )
    engines: EngineGroup = runtime(EngineGroup(), "engines apart from the trainers; by default there are none")
    reference: ScorerGroup = runtime(
        ScorerGroup(), "the model before training, apart from the trainers; for full training with kl"
    )
    reward_models: ScorerGroup = runtime(
        ScorerGroup(), "reward models apart from the trainers: so many actors of each one that rewards name"
    )
    staleness: int = Field(
        0, ge=0, description="updates of the weights that may lie between the first token of an answer and its use: "
        "engines go on while the policy is trained; 0 = they wait for it (AReaL, arXiv 2505.24298: 4 to 8)"
    )  # fmt: skip
    importance_cap: float = Field(
        2.0, ge=1, description="with staleness: most that a token may count for being likelier to the policy before "
        "its update than to the weights that drew it (AReaL: 5; truncated importance sampling: 2)"
    )  # fmt: skip
    environment: EnvironmentOptions | None = Field(
        None, description="tools or whatever else answers are told about; null = an answer is one turn"
    )
    rewards: tuple[RewardSource, ...] = Field(
        (), description="rules, reward models and judges whose weighted sum is the reward"
    )
    failed_reward: float = Field(0.0, description="reward of an answer whose function or judge failed")
    bad_rewards: float = Field(
        0.05, ge=0, lt=1, description="share of a step's answers whose function or judge may fail or time out"
    )
    rows: int = Field(512, ge=16, description="tokens of a packed training sequence; at least prompt and answer")


class PpoOptions(Options):
    """Proximal policy optimization with a learned value function (Schulman et al. 2017, arXiv 1707.06347; for language
    models Ziegler et al. 2019, arXiv 1909.08593)."""

    gamma: float = Field(1.0, gt=0, le=1, description="discount of later rewards, a token (1: an answer is short)")
    gae_lambda: float = Field(
        0.95, ge=0, le=1, description="lambda of generalized advantage estimation (arXiv 1506.02438: 0.95)"
    )
    value_weight: float = Field(0.1, ge=0, description="weight of the value loss beside the policy's")
    value_clip: float | None = Field(
        0.2, gt=0, description="how far a value may move from the one the answers were drawn with; null = freely"
    )
    whiten: bool = Field(True, description="advantages to mean 0 and deviation 1 over all tokens of the answers")
    kl_target: float | None = Field(
        None, gt=0, description="KL divergence from the reference, nats an answer, that the weight `rollouts.kl` is "
        "steered to (Ziegler: 6); null = the weight stays"
    )  # fmt: skip
    kl_horizon: int = Field(10_000, ge=1, description="answers over which the weight changes by a fifth at most")


def check_rollout_options(rollouts: RolloutOptions, ppo: PpoOptions | None) -> None:
    """Raises RecipeError for options that contradict each other."""
    if ppo is None and rollouts.group < 2 and rollouts.variant != "reinforce++":
        raise RecipeError(f"{rollouts.variant} compares the answers of a group, and one alone cannot be",
                          place="rollouts.group", mend="give a group of 2 at least, or use ppo")  # fmt: skip
    environment = rollouts.environment
    if environment is not None and environment.form == "plain" and not environment.stop:
        raise RecipeError("nothing ends a turn before the answer has ended", place="rollouts.environment.stop",
                          mend="give the strings that ask for an observation, or use form: chat")  # fmt: skip
    if environment is None and any(reward.kind == "environment" for reward in rollouts.rewards):
        raise RecipeError("there is no environment to earn anything from", place="rollouts.rewards",
                          mend="give rollouts.environment")  # fmt: skip
    if rollouts.staleness and rollouts.temperature != 1.0:
        raise RecipeError("what drew stale answers is known at temperature 1 only", place="rollouts.temperature",
                          mend="use temperature 1, or staleness: 0")  # fmt: skip
    if ppo is not None and "variant" in rollouts.model_fields_set:
        raise RecipeError(
            "ppo has no variants", place="rollouts.variant", mend="leave variant out, or use method: grpo"
        )
    if ppo is not None and ppo.kl_target is not None and not rollouts.kl:
        raise RecipeError("there is no KL penalty to steer", place="ppo.kl_target",
                          mend="give rollouts.kl, the weight to begin with (Ziegler: 0.2)")  # fmt: skip


def check_apart(rollouts: RolloutOptions, full: bool) -> None:
    """Raises RecipeError for actors that nobody would ask; `full` = all parameters are trained, not an adapter."""
    if rollouts.reference.count and not full:
        raise RecipeError("the reference is the policy with its adapter switched off, which needs no actor",
                          place="rollouts.reference.count",
                          mend="leave rollouts.reference out, or train all parameters (lora: null)")  # fmt: skip
    if rollouts.reference.count and not rollouts.kl:
        raise RecipeError("nobody asks the reference: there is no KL term", place="rollouts.reference.count",
                          mend="give rollouts.kl, or leave rollouts.reference out")  # fmt: skip
    if rollouts.reward_models.count and not any(reward.kind == "reward_model" for reward in rollouts.rewards):
        raise RecipeError("no reward model is named", place="rollouts.reward_models.count",
                          mend="add one to rollouts.rewards, or leave rollouts.reward_models out")  # fmt: skip


class RolloutStops(Options):
    """When reinforcement learning has gone wrong. Judged on means over `window` steps."""

    window: int = Field(10, ge=1, description="steps a mean is taken over")
    kl: float | None = Field(None, gt=0, description="KL divergence from the reference, nats a token; null = never")
    length: float | None = Field(
        None, gt=1, description="growth of the mean answer against the first window (reward hacking); null = never"
    )
    repetition: float | None = Field(
        None, gt=0, le=1, description="share of repeated 4-grams in answers (reward hacking); null = never"
    )
    reward: float | None = Field(None, description="mean reward that is enough; null = the whole budget")
