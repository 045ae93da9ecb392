"""Rewards of stage `align` before any worker starts: reward models among its inputs, keys of judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from modelyard.align.reward_options import JudgeOptions, RewardModelOptions, needs
from modelyard.errors import RecipeError
from modelyard.stages.base import PlanContext
from modelyard.stages.training import model_config, model_place
from modelyard.storage import Artifact, Files, join, read_bytes

if TYPE_CHECKING:
    from modelyard.stages.align import AlignOptions

OWN = ("model", "data")
"""Inputs of the stage that are no reward models."""


def reward_models(options: AlignOptions) -> list[str]:
    """Inputs that rewards name, each once."""
    sources = [o for o in options.rollouts.rewards if isinstance(o, RewardModelOptions)]
    return list(dict.fromkeys(name for source in sources for name in source.models))


def check_rewards(ctx: PlanContext[AlignOptions]) -> None:
    """Raises RecipeError for rewards that cannot be had: none, a reward model that is no input or does not fit the
    policy, a judge whose key is not set."""
    from modelyard.align.judge import judge_key

    options = ctx.options
    if not options.rollouts.rewards:
        raise RecipeError("nothing rewards the answers", place="rollouts.rewards", mend="name a reward")
    wanted = reward_models(options)
    for name in wanted:
        if name not in options.inputs or name in OWN:
            raise RecipeError(f"there is no reward model {name!r}", place="rollouts.rewards", mend=needs(name))
        _check_classifier(ctx, name)
    check_no_more(options, wanted)
    for source in options.rollouts.rewards:
        if isinstance(source, JudgeOptions) and source.key is not None:
            judge_key(source)
    check_same_tokenizers(ctx.inputs, wanted)


def check_no_more(options: AlignOptions, wanted: Sequence[str] = ()) -> None:
    """Raises RecipeError for an input that nothing uses."""
    for name in options.inputs:
        if name not in (*OWN, *wanted):
            raise RecipeError(
                f"nothing uses the input {name!r}",
                place=f"inputs.{name}",
                mend=f"inputs are {', '.join(OWN)}, and reward models that rollouts.rewards names",
            )


def _check_classifier(ctx: PlanContext[AlignOptions], name: str) -> None:
    config, rollouts = model_config(ctx.inputs.get(name), name), ctx.options.rollouts
    if config is None:
        return
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        raise RecipeError(
            f"the model is no reward model but {', '.join(kinds) or 'of no known kind'}",
            place=f"inputs.{name}",
            mend="give the artifact of a `reward` stage, or its folder model/ as path/*",
        )
    longest, room = ctx.options.sequence_length + rollouts.max_tokens, config.get("max_position_embeddings")
    if room and longest > room:
        raise RecipeError(
            f"prompts and answers of {longest:,} tokens are longer than the reward model's {room:,}",
            place=f"inputs.{name}",
            mend="lower sequence_length or rollouts.max_tokens",
        )


def check_same_tokenizers(inputs: Mapping[str, Artifact | Files], names: Sequence[str]) -> None:
    """Raises RecipeError where the policy and a reward model, both there already, have different tokenizers."""
    from modelyard.align.same_tokenizer import check_same_tokenizer

    known = [name for name in names if name in inputs]
    if known and "model" in inputs:
        policy = _tokenizer(inputs["model"], "model")
        for name in known:
            check_same_tokenizer(policy, _tokenizer(inputs[name], name), name)


def _tokenizer(value: Artifact | Files, name: str) -> bytes:
    place = model_place(value, name)
    folder = place if isinstance(place, str) else place[0].join(place[1])
    return read_bytes(join(folder, "tokenizer.json"))
