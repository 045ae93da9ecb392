"""The command as a person types it: exit codes, one-screen errors, help."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MODELYARD = [sys.executable, "-c", "from modelyard.cli import main; main()"]


def call(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MODELYARD, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd)


def test_help_teaches() -> None:
    result = call("--help")
    assert result.returncode == 0
    for command in ("plan", "run", "submit", "serve", "status", "report", "schema", "gc", "ui"):
        assert command in result.stdout
        page = call(command, "--help")
        assert page.returncode == 0
        assert len(page.stdout) > 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: n\nstages:\n  a: {kind: curat}\n", ["unknown stage kind 'curat'", "did you mean 'curate'", ":3"]),
        ("name: n\nstages:\n  a: {kind: curate, stepz: []}\n", ["unknown key 'stepz'", "did you mean 'steps'"]),
        ("name: n\nstages:\n  a: {kind: curate, inputs: {files: /nowhere/*.txt}, steps: [{normalize: {}}]}\n",
         ["no file matches", "/nowhere/*.txt"]),
    ],
)  # fmt: skip
def test_a_mistake_is_one_screen_and_exit_code_2(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    for command in ("plan", "run"):
        result = call(command, str(path), "--root", str(tmp_path / "root"))
        assert result.returncode == 2, result.stderr
        assert len(result.stderr.splitlines()) < 24
        assert "Traceback" not in result.stderr
        for word in words:
            assert word in " ".join(result.stderr.split())


def test_usage_mistakes_exit_2() -> None:
    for arguments in (["run"], ["frobnicate"], ["run", "x.yaml", "--bogus"], ["run", "/nowhere/x.yaml"]):
        result = call(*arguments)
        assert result.returncode == 2, arguments
        assert "Traceback" not in result.stderr


def test_schema_is_valid_and_accepts_the_shipped_recipes() -> None:
    import jsonschema
    import yaml

    result = call("schema")
    assert result.returncode == 0, result.stderr
    schema = json.loads(result.stdout)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    recipes = sorted((Path(__file__).parents[2] / "pipelines").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        validator.validate(yaml.safe_load(recipe.read_text()))
    assert not validator.is_valid({"name": "x", "stages": {"a": {"kind": "curate", "nonsense": 1}}})


def test_gc_on_an_empty_root(tmp_path: Path) -> None:
    result = call("gc", str(tmp_path))
    assert result.returncode == 0
    assert "0 folders" in result.stdout
