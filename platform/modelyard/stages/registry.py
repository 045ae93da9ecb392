"""Stage kinds by name. Built-in kinds are loaded on first use; packages add their own by entry point.

A package offers a kind with the entry-point group `modelyard.stages`: `name = "package.module:Class"`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points

from modelyard.errors import RecipeError
from modelyard.recipe.schema import StageOptions
from modelyard.stages.base import Stage

BUILT_IN = {
    "curate": "modelyard.stages.curate:CurateStage",
    "classifier": "modelyard.stages.classifier:ClassifierStage",
    "tokenize": "modelyard.stages.tokenize:TokenizeStage",
    "pretrain": "modelyard.stages.pretrain:PretrainStage",
    "scaling": "modelyard.stages.scaling:ScalingStage",
    "finetune": "modelyard.stages.finetune:FinetuneStage",
    "reward": "modelyard.stages.reward:RewardStage",
    "align": "modelyard.stages.align:AlignStage",
    "merge": "modelyard.stages.merge:MergeStage",
    "evaluate": "modelyard.stages.evaluate:EvaluateStage",
    "generate": "modelyard.stages.generate:GenerateStage",
    "refusals": "modelyard.stages.refusals:RefusalStage",
    "register": "modelyard.stages.register:RegisterStage",
    "deploy": "modelyard.stages.deploy:DeployStage",
}


_ADDED: dict[str, str] = {}


def add(kind: str, target: str) -> None:
    """Adds a kind for this process, as an entry point would: `add("score", "my.module:ScoreStage")`."""
    _ADDED[kind] = target


@cache
def _installed() -> dict[str, str]:
    return BUILT_IN | {entry.name: entry.value for entry in entry_points(group="modelyard.stages")}


def kinds() -> dict[str, str]:
    """Kind -> `module:Class`, the built-in ones first."""
    return _installed() | _ADDED


@cache
def stage(kind: str) -> Stage[StageOptions]:
    """The stage of a kind. Raises RecipeError for an unknown kind or a plugin that cannot be loaded."""
    target = kinds().get(kind)
    if target is None:
        raise RecipeError(f"unknown stage kind {kind!r}", mend=f"kinds: {', '.join(kinds())}")
    module, _, name = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"the stage kind {kind!r} cannot be loaded: {error}", place=target) from error
    instance: Stage[StageOptions] = found()
    return instance


class _OptionModels(Mapping[str, type[StageOptions]]):
    """Loads a kind only when it is looked up: a recipe pays for, and fails with, only what it uses."""

    def __getitem__(self, kind: str) -> type[StageOptions]:
        if kind not in kinds():
            raise KeyError(kind)
        return stage(kind).Options

    def __iter__(self) -> Iterator[str]:
        return iter(kinds())

    def __len__(self) -> int:
        return len(kinds())


def option_models() -> Mapping[str, type[StageOptions]]:
    """Kind -> option model, for loading recipes."""
    return _OptionModels()
