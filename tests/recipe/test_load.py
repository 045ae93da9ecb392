"""Recipe files: every mistake is named with file, line, and the nearest valid word."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter

from modelyard.errors import RecipeError
from modelyard.recipe import (
    Bytes,
    Options,
    StageOptions,
    decisive,
    differences,
    fingerprint,
    load_recipe,
    runtime,
)
from modelyard.recipe.source import parse


class Deep(Options):
    rate: float = Field(0.1, gt=0)
    name: Literal["x", "y"] = "x"
    threads: int = runtime(1, "threads")


class Bake(StageOptions):
    kind: Literal["bake"] = "bake"
    oven: Deep = Deep()
    steps: tuple[dict[str, Deep], ...] = ()
    size: Bytes = 0
    either: Deep | int = 3


KINDS = {"bake": Bake}


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def test_a_good_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERE", "/data")
    path = write(
        tmp_path,
        "name: good\nroot: ${WHERE}/root\nstages:\n  a:\n    kind: bake\n    oven: {rate: 0.5}\n    size: 30MB\n"
        "    inputs: {x: '${python:purelib}', y: '${NOT_SET:-fallback}'}\n",
    )
    recipe = load_recipe(path, KINDS, ["a.oven.name=y", "a.steps=[{mix: {rate: 2}}]", "a.steps.0.mix.rate=4"])
    stage = recipe.stages["a"]
    assert isinstance(stage, Bake)
    assert recipe.root == "/data/root"
    assert (stage.oven.rate, stage.oven.name, stage.size) == (0.5, "y", 30_000_000)
    assert stage.steps[0]["mix"].rate == 4
    assert stage.inputs["y"] == "fallback"
    assert str(stage.inputs["x"]).endswith("site-packages")


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("stages:\n  a: {kind: bake}\n", None, "Field required"),
        ("name: n\nstages:\n  a:\n    kind: bake\n    ovn: {}\n", 5, "unknown key 'ovn'; did you mean 'oven'?"),
        ("name: n\nstages:\n  a:\n    kind: bake\n    oven:\n      rat: 1\n", 6, "did you mean 'rate'?"),
        ("name: n\nstages:\n  a:\n    kind: bake\n    oven: {rate: fast}\n", 5, "valid number"),
        ("name: n\nstages:\n  a:\n    kind: bake\n    oven: {rate: -1}\n", 5, "greater than 0 (got -1)"),
        ("name: n\nstages:\n  a:\n    kind: bake\n    steps:\n      - mix: {nam: x}\n", 6, "did you mean 'name'?"),
        ("name: n\nstages:\n  a:\n    kind: bakery\n", 4, "unknown stage kind 'bakery'; did you mean 'bake'?"),
        ("name: n\nstages:\n  a: 3\n", 3, "a stage is a mapping with a kind"),
        ("name: n\nroot: x\nname: m\nstages: {}\n", 3, "written twice"),
        ("name: n\nroot: ${NOT_SET_AT_ALL}\nstages: {a: {kind: bake}}\n", 2, "NOT_SET_AT_ALL} is not set"),
        ("name: n\nstages:\n  a: {kind: bake\n", 4, "not valid YAML"),
        ("name: Bad Name\nstages:\n  a: {kind: bake}\n", 1, "use lower-case letters"),
        ("name: n\nstages:\n  a: {kind: bake, size: huge}\n", 3, "is not a size"),
        ("- 1\n", None, "a recipe is a mapping"),
        ("name: n\nstages: {}\n", None, "needs stages"),
    ],
)
def test_mistakes_are_named_with_line_and_mend(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(tmp_path, text), KINDS)
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
    if line is not None:
        assert f"r.yaml:{line}" in str(caught.value)


def test_all_mistakes_are_shown_at_once(tmp_path: Path) -> None:
    text = "name: n\nstages:\n  a: {kind: bake, x: 1, y: 2}\n  b: {kind: cake}\n"
    with pytest.raises(RecipeError, match="3 mistakes in the recipe"):
        load_recipe(write(tmp_path, text), KINDS)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("oven", "not of the form path=value"),
        ("b.oven=1", "there is no stage 'b'"),
        ("a.kind.x=1", "has no 'x'"),
        ("a.size=[", "not a YAML value"),
        ("a.oven.rrate=1", "did you mean 'rate'?"),
    ],
)
def test_bad_overrides(tmp_path: Path, assignment: str, message: str) -> None:
    path = write(tmp_path, "name: n\nstages:\n  a: {kind: bake}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, KINDS, [assignment])
    assert message in str(caught.value)


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "none.yaml", KINDS)
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(binary, KINDS)


def test_runtime_fields_never_enter_a_fingerprint() -> None:
    a = decisive(Bake(oven=Deep(threads=1), retries=0))
    b = decisive(Bake(oven=Deep(threads=8), retries=5, resources={"workers": 9}))  # type: ignore[arg-type]
    assert a == b
    assert "threads" not in a["oven"]
    assert "inputs" not in a


def test_fingerprint_depends_on_everything_else() -> None:
    base = fingerprint("bake", 1, {"a": 1}, {"x": "y"})
    assert base == fingerprint("bake", 1, {"a": 1}, {"x": "y"})
    others = [
        fingerprint("cake", 1, {"a": 1}, {"x": "y"}),
        fingerprint("bake", 2, {"a": 1}, {"x": "y"}),
        fingerprint("bake", 1, {"a": 2}, {"x": "y"}),
        fingerprint("bake", 1, {"a": 1}, {"x": "z"}),
    ]
    assert len({base, *others}) == 5


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(_JSON, _JSON)
def test_differences_are_empty_exactly_when_equal(left: object, right: object) -> None:
    assert differences(left, left) == []
    # JSON has no difference between 1 and True in Python's ==; the fingerprint compares the text.
    if left != right:
        assert differences(left, right)


@given(st.integers(0, 10**6), st.sampled_from(["", "k", "M", "G", "T"]), st.booleans())
def test_sizes(number: int, unit: str, binary: bool) -> None:
    text = f"{number}{unit}{'i' if binary and unit else ''}B"
    expected = number * (1024 if binary and unit else 1000) ** " kMGT".index(unit or " ")
    assert TypeAdapter(Bytes).validate_python(text) == expected


def test_places_of_lists() -> None:
    source = parse("a:\n  - x: 1\n  - y: 2\n", "f.yaml")
    assert source.place(("a", 1, "y")) == "f.yaml:3 (a.1.y)"
    assert source.place(("a", 1, "zz")) == "f.yaml:3 (a.1.zz)"
