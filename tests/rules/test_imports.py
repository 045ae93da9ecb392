"""Import directions: the contracts of `.importlinter`, and cores that import where Ray and MLflow are absent."""

from __future__ import annotations

import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = CHECKOUT / "platform" / "modelyard"
CONTRACTS = CHECKOUT / ".importlinter"


def contracts() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(CONTRACTS)
    return parser


def cores() -> list[str]:
    return contracts()["importlinter:contract:cores"]["source_modules"].split()


def rooms() -> set[str]:
    """Packages and modules directly below modelyard."""
    found = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    return found | {path.stem for path in PACKAGE.glob("*.py") if path.stem not in ("__init__", "__main__")}


def lint(source_root: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--config", str(CONTRACTS), "--no-cache"],
        env=os.environ | {"PYTHONPATH": str(source_root), "NO_COLOR": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_contracts_hold(tmp_path: Path) -> None:
    done = lint(CHECKOUT / "platform", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors.py", "import modelyard.storage"),
        ("planner/estimate.py", "def late() -> None:\n    import ray\n"),
        ("stages/registry.py", "import mlflow"),
        ("storage/uri.py", "import modelyard.recipe"),
        ("tokens/order.py", "import modelyard.models"),
    ],
    ids=["up from the ground", "Ray in a core, lazily", "MLflow outside tracking", "up a floor", "core to core"],
)
def test_the_contracts_notice_a_forbidden_import(module: str, line: str, tmp_path: Path) -> None:
    copy = tmp_path / "platform" / "modelyard"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", "static", "data"))
    with (copy / module).open("a") as file:
        file.write(f"\n\n{line}\n")
    done = lint(tmp_path / "platform", tmp_path)
    assert done.returncode == 1
    assert "BROKEN" in done.stdout, done.stdout


def test_every_room_stands_on_a_floor_and_every_core_is_under_contract() -> None:
    layers = contracts()["importlinter:contract:floors"]["layers"]
    floors = {word.strip("()") for word in layers.replace("|", " ").replace(":", " ").split()}
    assert rooms() <= floors
    uses_ray_or_mlflow = {"cli", "stages", "serving", "tracking"}
    assert {f"modelyard.{room}" for room in rooms() - uses_ray_or_mlflow} == set(cores())


def test_cores_import_where_ray_and_mlflow_are_absent() -> None:
    program = """
import importlib, pkgutil, sys

class Without:
    # The two libraries are not installed here; others may still look for them politely.

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in ("ray", "mlflow") else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for core in sys.argv[1:]:
    module = importlib.import_module(core)
    for info in pkgutil.walk_packages(getattr(module, "__path__", []), core + "."):
        if not info.name.endswith("__main__"):
            importlib.import_module(info.name)
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *cores()],
        env=os.environ | {"PYTHONPATH": str(CHECKOUT / "platform")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.stdout.strip().endswith("imported"), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["run", "--help"], ["schema"]], ids=" ".join)
def test_light_commands_load_no_heavy_library(arguments: list[str]) -> None:
    program = """
import sys
from modelyard.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    heavy = {"ray", "mlflow", "torch", "transformers", "numba", "peft", "datasets", "pandas"} & set(sys.modules)
    print("HEAVY", *sorted(heavy), file=sys.stderr)
    sys.exit(end.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip().splitlines()[-1] == "HEAVY", done.stderr
