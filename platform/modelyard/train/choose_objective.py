"""From the recipe's `objective` to a function: one of ours by name, or anyone's by import path."""

from __future__ import annotations

from importlib import import_module

from modelyard.errors import RecipeError
from modelyard.train.denoise import prefix_lm, span_corruption
from modelyard.train.method_options import DenoisingOptions
from modelyard.train.objective import Objective, causal_lm, causal_lm_by_document, completion_lm
from modelyard.train.options import TrainOptions


def choose_objective(options: TrainOptions, usual: str) -> Objective:
    """The objective `options` name, or the program's `usual` one.

    Raises:
        RecipeError: an import path leads to nothing that can be called.
    """
    name = options.objective or usual
    if ":" in name:
        return load_objective(name)
    if name == "span_corruption":
        return span_corruption(options.denoising or DenoisingOptions())
    causal = causal_lm_by_document if options.document_mask else causal_lm
    return {"causal_lm": causal, "completion_lm": completion_lm, "prefix_lm": prefix_lm}[name]


def objective_name(objective: Objective) -> str:
    """What to call an objective, in messages and in the identity of checkpoints."""
    return str(getattr(objective, "__name__", type(objective).__name__))


def load_objective(path: str) -> Objective:
    """The function `package.module:function` names. Importing a module runs it: name only modules you trust.

    Raises:
        RecipeError: the module cannot be imported, or holds no such function.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            f"there is no objective {path}: {error}",
            place="objective",
            mend="install the module for the workers too, and write package.module:function",
        ) from error
    if not callable(found):
        raise RecipeError(f"objective {path} is a {type(found).__name__}, not a function", place="objective")
    objective: Objective = found
    return objective
