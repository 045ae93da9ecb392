"""From a recipe file to a validated :class:`Recipe`; every mistake is named with file, line and mend."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from modelyard.errors import RecipeError
from modelyard.recipe.schema import Recipe, StageOptions
from modelyard.recipe.source import Source, override, parse

Model = TypeVar("Model", bound=BaseModel)
Kinds = Mapping[str, type[StageOptions]]
_CREDENTIALS = re.compile(r"//[^/@\s]+@")
_MAX_ERRORS = 8


def load_recipe(path: str | Path, kinds: Kinds, overrides: Sequence[str] = ()) -> Recipe:
    """Loads, fills in, overrides and validates a recipe file, and makes its S3 endpoint this process's.

    Args:
        path: a YAML file.
        kinds: stage kind -> its option model.
        overrides: `stage.key=value` assignments, as of `--set`.

    Raises:
        RecipeError: the file is absent or anything in it is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read the recipe: {error}", place=str(path), mend="give the path of a YAML file"
        ) from error
    source = parse(text, str(path))
    override(source, overrides)
    recipe = build_recipe(source, kinds)
    from modelyard.storage.uri import use_endpoints

    use_endpoints(recipe.endpoint)
    return recipe


def build_recipe(source: Source, kinds: Kinds) -> Recipe:
    """Validates parsed data. Raises RecipeError that lists up to eight mistakes."""
    stages = source.data.get("stages")
    if not isinstance(stages, dict) or not stages:
        raise RecipeError("a recipe needs stages", place=source.name, mend="see pipelines/quickstart.yaml")
    mistakes: list[str] = []
    built: dict[str, Any] = {}
    for name, data in stages.items():
        built[name] = _stage(source, name, data, kinds, mistakes)
    top = {key: value for key, value in source.data.items() if key != "stages"}
    recipe: Recipe | None = None
    try:
        probe = {name: value or StageOptions(kind="?") for name, value in built.items()}
        recipe = Recipe.model_validate({**top, "stages": probe})
    except ValidationError as error:
        mistakes += _describe(error, Recipe, source, ())
    if mistakes or recipe is None:
        raise RecipeError(_summary(mistakes), place=source.name, mend="`modelyard schema` prints every valid key")
    return recipe


def build_options(model: type[Model], data: dict[str, Any], overrides: Sequence[str] = ()) -> Model:
    """One option model from plain values, as a command without a recipe takes them.

    Args:
        model: the option model.
        data: its values; changed by the overrides.
        overrides: `key.sub=value` assignments, as of `--set`.

    Raises:
        RecipeError: a value, a key or an assignment is wrong.
    """
    source = Source("the command line", {"stages": {"options": data}})
    override(source, [f"options.{assignment}" for assignment in overrides])
    try:
        return model.model_validate(data)
    except ValidationError as error:
        mistakes = [
            # `literal[...]` is pydantic's name for one of several types, not a key.
            f"{'.'.join(str(part) for part in item['loc'] if '[' not in str(part))}: {_message(item, model)}"
            for item in _items(error)
        ]
    raise RecipeError("\n  - ".join(["wrong options", *mistakes]), place=source.name)


def _summary(mistakes: list[str]) -> str:
    shown = mistakes[:_MAX_ERRORS]
    if len(mistakes) > _MAX_ERRORS:
        shown.append(f"... and {len(mistakes) - _MAX_ERRORS} more")
    title = "1 mistake in the recipe" if len(mistakes) == 1 else f"{len(mistakes)} mistakes in the recipe"
    return "\n  - ".join([title, *shown])


def _stage(source: Source, name: str, data: Any, kinds: Kinds, mistakes: list[str]) -> StageOptions | None:
    path = ("stages", name)
    if not isinstance(data, dict) or not isinstance(data.get("kind"), str):
        mistakes.append(f"{source.place(path)}: a stage is a mapping with a kind; kinds: {', '.join(kinds)}")
        return None
    model = kinds.get(data["kind"])
    if model is None:
        mistakes.append(
            f"{source.place((*path, 'kind'))}: unknown stage kind {data['kind']!r}{nearest(data['kind'], kinds)}"
        )
        return None
    try:
        return model.model_validate(data)
    except ValidationError as error:
        mistakes += _describe(error, model, source, path)
        return None


def nearest(word: str, valid: Mapping[str, Any] | Sequence[str]) -> str:
    """`; did you mean 'x'?` or the list of valid words."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else f"; valid: {', '.join(valid)}"


def _describe(error: ValidationError, model: type[BaseModel], source: Source, path: tuple[str | int, ...]) -> list[str]:
    lines: dict[str, None] = {}
    for item in _items(error):
        # Union tags and list wrappers stand in `loc` but not in the file: keep what the file has.
        where = path + tuple(part for part in item["loc"] if _in_file(source, path, item["loc"], part))
        lines[f"{source.place(where)}: {_message(item, model)}"] = None
    return list(lines)


def _items(error: ValidationError) -> Iterator[Mapping[str, Any]]:
    yield from error.errors(include_url=False, include_context=False)


def _message(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What is wrong, in one sentence, of one of pydantic's complaints."""
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        key = str(item["loc"][-1])
        return f"unknown key {key!r}{nearest(key, sorted(set(field_names(model, item['loc'][:-1]))))}"
    if item["type"] != "missing" and isinstance(item["input"], (str, int, float, bool)):
        return f"{message} (got {_CREDENTIALS.sub('//***@', repr(item['input']))})"
    return message


def _in_file(source: Source, path: tuple[str | int, ...], loc: tuple[str | int, ...], part: str | int) -> bool:
    if part == loc[-1]:
        return True
    return any(part in known[len(path) :] for known in source.lines if known[: len(path)] == path)


def field_names(model: Any, loc: Sequence[str | int]) -> Iterator[str]:
    """Names of the fields valid at `loc` below an option model, through unions, lists and mappings."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        if not loc:
            yield from model.model_fields
            return
        field = model.model_fields.get(str(loc[0]))
        if field is not None:
            yield from field_names(field.annotation, loc[1:])
            return
        # A union tag such as the class name: stay at this model.
        if str(loc[0]) == model.__name__:
            yield from field_names(model, loc[1:])
        return
    arguments = [a for a in get_args(model) if a is not type(None)]
    for argument in arguments:
        yield from field_names(argument, loc)
        if loc and not (
            isinstance(argument, type) and issubclass(argument, BaseModel) and loc[0] in argument.model_fields
        ):
            yield from field_names(argument, loc[1:])
