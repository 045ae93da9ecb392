"""Recipes: the option models, loading with places in errors, overrides, and fingerprints.

Imports only `storage` and `errors`. Stage kinds are handed in by the caller, so nothing here knows
what a stage does.
"""

from modelyard.recipe.fingerprint import decisive, differences, fingerprint
from modelyard.recipe.load import build_options, load_recipe
from modelyard.recipe.schema import Bytes, FileInput, Options, Recipe, Resources, StageOptions, runtime

__all__ = [
    "Bytes",
    "FileInput",
    "Options",
    "Recipe",
    "Resources",
    "StageOptions",
    "build_options",
    "decisive",
    "differences",
    "fingerprint",
    "load_recipe",
    "runtime",
]
