"""Rules on the package's code: option models, docstrings, and fingerprints that no process changes."""

from __future__ import annotations

import ast
import importlib
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "platform" / "modelyard"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))


def _subclasses(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for sub in model.__subclasses__():
        yield sub
        yield from _subclasses(sub)


@cache
def option_models() -> list[type[BaseModel]]:
    """Every option model of the package; imports every module of it."""
    import modelyard
    from modelyard.recipe.schema import Options

    for info in pkgutil.walk_packages(modelyard.__path__, "modelyard."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
    found = {model for model in _subclasses(Options) if model.__module__.startswith("modelyard.")}
    return [Options, *sorted(found, key=lambda model: model.__qualname__)]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def test_option_models_are_frozen_and_refuse_unknown_keys() -> None:
    for model in option_models():
        assert model.model_config.get("extra") == "forbid", model
        assert model.model_config.get("frozen") is True, model


def test_what_an_option_model_holds_is_an_option_model() -> None:
    known = set(option_models())
    for model in known:
        for name, field in model.model_fields.items():
            assert set(_models_in(field.annotation)) <= known, f"{model.__qualname__}.{name}"


def _only_one_value(annotation: Any) -> bool:
    """A tag such as `kind: Literal["curate"]`: it tells models apart and leaves nothing to choose."""
    return get_origin(annotation) is Literal and len(get_args(annotation)) == 1


def test_every_option_is_described() -> None:
    silent = [
        f"{model.__module__}.{model.__qualname__}.{name}"
        for model in option_models()
        for name, field in model.model_fields.items()
        if not _only_one_value(field.annotation) and not (field.description or "").strip()
    ]
    assert not silent


def _public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_public_names_have_a_docstring(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module says in a line what it is for"
    silent = [f"{path.name}:{node.lineno} {node.name}" for node in _public(tree.body) if not ast.get_docstring(node)]
    assert not silent


def _raised(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    from modelyard import errors

    names = {name for name in vars(errors) if name.endswith("Error")}
    calls = (node.exc for node in ast.walk(function) if isinstance(node, ast.Raise))
    return {c.func.id for c in calls if isinstance(c, ast.Call) and isinstance(c.func, ast.Name) and c.func.id in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_public_function_names_the_errors_it_raises(path: Path) -> None:
    silent = [
        f"{path.name}:{node.lineno} {node.name} raises {name}"
        for node in _public(ast.parse(path.read_text()).body)
        if not isinstance(node, ast.ClassDef) and path.parent.name != "cli"  # there the docstring is the --help
        for name in _raised(node)
        if name not in (ast.get_docstring(node) or "")
    ]
    assert not silent


FINGERPRINTS = """
import sys
from modelyard.recipe import Options, decisive, fingerprint
from modelyard.stages import api, registry

class Probe(Options):
    words: frozenset[str] = frozenset(["zebra", "ant", "bee", "yak", "owl"])
    nested: dict[str, tuple[float, ...]] = {"b": (0.1, 3e-4), "a": (1e16, 2.0)}
    text: str = "caf\\u00e9 \\u96ea"

print(fingerprint("probe", 1, decisive(Probe()), {"z": "1", "a": "2"}))
for path in sys.argv[1:]:
    recipe = api.load(path)
    for name, options in recipe.stages.items():
        print(path, name, fingerprint(options.kind, registry.stage(options.kind).version, decisive(options), {}))
"""


def test_fingerprints_are_the_same_in_every_process() -> None:
    recipes = [str(path) for path in sorted((CHECKOUT / "pipelines").glob("*.yaml"))]
    seen = set()
    for seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINTS, *recipes],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


def test_a_known_fingerprint_stays() -> None:
    """A change here re-addresses every artifact people have: it must be meant."""
    from modelyard.recipe import fingerprint

    options = {"steps": [{"dedup": {"jaccard": 0.8}}], "text": "café"}
    known = "f03984082eb6611f9bc1a95fcaa536a43339475249dbf00dc024cbc63569cd0a"
    assert fingerprint("curate", 1, options, {"files": "00ff"}) == known


def test_resources_and_other_runtime_fields_do_not_enter_a_fingerprint() -> None:
    from modelyard.recipe import Resources, StageOptions, decisive

    small, large = (StageOptions(kind="curate", resources=Resources(workers=n), retries=n) for n in (1, 64))
    assert decisive(small) == decisive(large) == {"kind": "curate"}
