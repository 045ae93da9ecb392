"""The planner: parameters, FLOPs, memory, time, cost and energy before any is spent, and scaling laws.

Pure functions over plain mappings and data tables (`data/*.yaml`). Imports only `modelyard.errors`,
PyYAML and, in `scaling`, NumPy; no torch, no Ray, no MLflow. The names used most are exported
here and load on first use, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.planner.estimate import Estimate
    from modelyard.planner.flops import flops_per_token, hfu, mfu
    from modelyard.planner.hardware import Hardware, find_hardware
    from modelyard.planner.layout import Layout
    from modelyard.planner.memory import serving_memory, training_memory
    from modelyard.planner.parameters import Parameters, count
    from modelyard.planner.time import step_time
    from modelyard.planner.training import estimate_training

_HOME = {
    "Estimate": "estimate",
    "Hardware": "hardware",
    "Layout": "layout",
    "Parameters": "parameters",
    "count": "parameters",
    "estimate_training": "training",
    "flops_per_token": "flops",
    "find_hardware": "hardware",
    "hfu": "flops",
    "mfu": "flops",
    "serving_memory": "memory",
    "step_time": "time",
    "training_memory": "memory",
}

__all__ = [
    "Estimate",
    "Hardware",
    "Layout",
    "Parameters",
    "count",
    "estimate_training",
    "find_hardware",
    "flops_per_token",
    "hfu",
    "mfu",
    "serving_memory",
    "step_time",
    "training_memory",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(name)
    return getattr(importlib.import_module(f"modelyard.planner.{_HOME[name]}"), name)
