"""The JSON Schema of recipes, assembled from every stage kind's option model."""

from __future__ import annotations

from typing import Any

from modelyard.errors import RecipeError
from modelyard.recipe import Recipe
from modelyard.stages import registry


def recipe_schema(kind: str | None = None) -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a whole recipe, or of one stage kind's options.

    Raises RecipeError for an unknown kind.
    """
    if kind is not None:
        return _stage_schema(kind)
    schema = Recipe.model_json_schema()
    definitions: dict[str, Any] = schema.pop("$defs", {})
    variants = []
    for name in registry.kinds():
        stage = _stage_schema(name)
        definitions |= stage.pop("$defs", {})
        definitions[f"stage_{name}"] = stage
        variants.append({"$ref": f"#/$defs/stage_{name}"})
    schema["properties"]["stages"]["additionalProperties"] = {"oneOf": variants}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "$defs": definitions}


def _stage_schema(kind: str) -> dict[str, Any]:
    if kind not in registry.kinds():
        raise RecipeError(f"unknown stage kind {kind!r}", mend=f"kinds: {', '.join(registry.kinds())}")
    schema = registry.stage(kind).Options.model_json_schema()
    schema["properties"]["kind"] = {"const": kind}
    return schema
