"""modelyard: from raw text to a served model with one typed recipe, on a laptop or a Ray cluster.

    from modelyard import load, plan, run
    outcome = run(load("pipelines/quickstart.yaml", ["base.steps=100"]))

Importing the package is cheap; Ray, torch and MLflow are imported by what needs them.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "__version__", "load", "plan", "run"]

_HOMES = {
    "Recipe": "modelyard.recipe.schema",
    "load": "modelyard.stages.api",
    "plan": "modelyard.stages.api",
    "run": "modelyard.stages.api",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'modelyard' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
