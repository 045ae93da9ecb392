"""Training: one loop that knows mesh, precision, accumulation, clipping, schedule, checkpoints and metrics.

A core: it imports neither Ray nor MLflow. It may use `models`, `tokens`, `recipe.schema` and what lies below them. An
objective is a function (`objective.py`), parallelism a mesh and a plan (`parallel/`), and a whole job a program
(`programs.py`) that runs the same under Ray Train, torchrun or a debugger.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.train.loop import Job, Outcome, fit
    from modelyard.train.metrics import StepMetrics
    from modelyard.train.objective import Objective, causal_lm, completion_lm
    from modelyard.train.options import TrainOptions
    from modelyard.train.programs import FinetuneJob, PretrainJob, finetune, pretrain
    from modelyard.train.world import World

_HOME = {
    "Job": "loop",
    "Outcome": "loop",
    "fit": "loop",
    "StepMetrics": "metrics",
    "Objective": "objective",
    "causal_lm": "objective",
    "completion_lm": "objective",
    "TrainOptions": "options",
    "FinetuneJob": "programs",
    "PretrainJob": "programs",
    "finetune": "programs",
    "pretrain": "programs",
    "World": "world",
}

__all__ = [
    "FinetuneJob",
    "Job",
    "Objective",
    "Outcome",
    "PretrainJob",
    "StepMetrics",
    "TrainOptions",
    "World",
    "causal_lm",
    "completion_lm",
    "finetune",
    "fit",
    "pretrain",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
