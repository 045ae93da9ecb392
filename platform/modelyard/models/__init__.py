"""Models: presets, building from a transformers configuration, adapters, and export to the ecosystem's folders.

A core: it imports neither Ray nor MLflow, and from the project only `errors` and `recipe.schema`. The model is plain
PyTorch and knows no parallelism; `train.parallel` applies that from outside. torch and transformers are imported
when a function here is first used, so that `modelyard plan` can read option models in a moment.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelyard.models.adapters import add_adapter, merge_adapter, save_adapter
    from modelyard.models.build import build_config, build_on_meta, count_parameters, initialise
    from modelyard.models.export import export_model, load_model, read_config
    from modelyard.models.options import AdapterOptions, LoraOptions, ModelOptions
    from modelyard.models.presets import PRESETS, Shape

_HOME = {
    "add_adapter": "adapters",
    "merge_adapter": "adapters",
    "save_adapter": "adapters",
    "build_config": "build",
    "build_on_meta": "build",
    "count_parameters": "build",
    "initialise": "build",
    "export_model": "export",
    "load_model": "export",
    "read_config": "export",
    "AdapterOptions": "options",
    "LoraOptions": "options",
    "ModelOptions": "options",
    "PRESETS": "presets",
    "Shape": "presets",
}

__all__ = [
    "PRESETS",
    "AdapterOptions",
    "LoraOptions",
    "ModelOptions",
    "Shape",
    "add_adapter",
    "build_config",
    "build_on_meta",
    "count_parameters",
    "export_model",
    "initialise",
    "load_model",
    "merge_adapter",
    "read_config",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
