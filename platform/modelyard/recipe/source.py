"""YAML with places: plain values, the line of every key, `${...}` filled in, overrides applied."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from modelyard.errors import RecipeError

_VARIABLE = re.compile(r"\$\{([^}]*)\}")
Path = tuple[str | int, ...]


@dataclass
class Source:
    """A parsed recipe file: `data` holds plain values, `lines` the 1-based line of every path in it."""

    name: str
    data: dict[str, Any]
    lines: dict[Path, int] = field(default_factory=dict)

    def place(self, path: Sequence[str | int]) -> str:
        """`file:line (a.b.c)` of the deepest known part of `path`."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        dotted = ".".join(str(part) for part in path)
        line = self.lines.get(known)
        return f"{self.name}:{line} ({dotted})" if line else f"{self.name} ({dotted})"


def parse(text: str, name: str) -> Source:
    """Parses YAML. Raises RecipeError with line for bad YAML, a repeated key or an unset variable."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError(f"not valid YAML: {getattr(error, 'problem', error)}", place=where) from error
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            "a recipe is a mapping with name, root and stages", place=name, mend="see pipelines/quickstart.yaml"
        )
    source = Source(name, {})
    source.data = _build(node, (), source)
    return source


def _build(node: yaml.Node, path: Path, source: Source) -> Any:
    source.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _build_mapping(node, path, source)
    if isinstance(node, yaml.SequenceNode):
        return [_build(child, (*path, i), source) for i, child in enumerate(node.value)]
    value = yaml.SafeLoader("").construct_object(node)
    return fill(value, source.place(path)) if isinstance(value, str) else value


def _build_mapping(node: yaml.MappingNode, path: Path, source: Source) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        here = (*path, key)
        source.lines[here] = key_node.start_mark.line + 1
        if key in result:
            raise RecipeError(f"the key {key!r} is written twice", place=source.place(here), mend="keep one of them")
        result[key] = _build(value_node, here, source)
    return result


def fill(text: str, place: str) -> str:
    """Fills `${NAME}`, `${NAME:-default}` from the environment and `${python:purelib}` from sysconfig.

    Raises RecipeError, with `place`, for a variable that is not set and has no default.
    """

    def value(match: re.Match[str]) -> str:
        name, has_default, default = match.group(1).partition(":-")
        if name.startswith("python:"):
            found = sysconfig.get_paths().get(name.removeprefix("python:"))
        else:
            found = os.environ.get(name) or (default if has_default else None)
        if found is None:
            raise RecipeError(
                f"${{{name}}} is not set", place=place, mend=f"export {name}=... or write ${{{name}:-default}}"
            )
        return found

    return _VARIABLE.sub(value, text)


def override(source: Source, assignments: Sequence[str]) -> None:
    """Applies `stage.key.sub=value` (or `name=`, `root=`) in place; values are YAML.

    Raises RecipeError for an assignment without `=` or a path that leads through a scalar.
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path:
            raise RecipeError(f"--set {assignment!r} is not of the form path=value", mend="--set base.seed=7")
        keys: list[str] = path.split(".")
        if keys[0] not in ("name", "root", "stages"):
            keys.insert(0, "stages")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"--set {path}: {text!r} is not a YAML value", mend="quote it") from error
        _assign(source, keys, value, assignment)


def _assign(source: Source, keys: list[str], value: Any, assignment: str) -> None:
    if keys[0] == "stages" and len(keys) > 1 and keys[1] not in (source.data.get("stages") or {}):
        names = ", ".join(source.data.get("stages") or {})
        raise RecipeError(f"--set {assignment}: there is no stage {keys[1]!r}", mend=f"stages: {names}")
    here: Any = source.data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
        else:
            raise RecipeError(
                f"--set {assignment}: {'.'.join(keys[:depth])} has no {key!r}", place=source.place(keys[:depth])
            )
        if last:
            here[index] = value
        elif isinstance(here, dict) and here.get(index) is None:
            here[index] = {}
        here = here[index]
