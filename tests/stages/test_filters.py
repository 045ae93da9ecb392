"""A recipe that trains a classifier and curates with it, against evaluation sets: plan, run, audit, report."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow.dataset as pads
import pytest

from modelyard import plan, run
from modelyard.errors import RecipeError

NEUTRAL = "the of and to in is that it was for on are as with his they at be this from women"
ITEM = "how many apples does Tom have when he gives three of his seven apples to Ann today"
RECIPE = """
name: filters
root: {folder}/root
stages:
  quality:
    kind: classifier
    inputs: {{good: [{folder}/good.jsonl], bad: [{folder}/bad.jsonl]}}
    bits: 12
  corpus:
    kind: curate
    inputs: {{files: [{folder}/in.jsonl], tests: [{folder}/tests.jsonl], model: quality}}
    steps:
      - groups: {{}}
      - decontaminate: {{against: tests}}
      - dedup: {{method: exact}}
      - classify: {{model: model}}
"""


def write(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))


def sentences(seed: int, own: list[str], number: int) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choice([*NEUTRAL.split(), *own]) for _ in range(25)) for _ in range(number)]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    good, bad = ["theorem", "proof", "lemma"], ["buy", "cheap", "click"]
    write(tmp_path / "good.jsonl", sentences(1, good, 300))
    write(tmp_path / "bad.jsonl", sentences(2, bad, 300))
    mixed = sentences(3, good, 40) + sentences(4, bad, 30)
    write(tmp_path / "in.jsonl", [*mixed, mixed[0], f"{sentences(5, good, 1)[0]}. {ITEM.upper()}!"])
    write(tmp_path / "tests.jsonl", [ITEM])
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path / "recipe.yaml"


def test_train_decontaminate_and_classify_in_one_recipe(ray_session: None, recipe: Path) -> None:
    result = run(recipe)
    corpus, model = result.artifacts["corpus"], result.artifacts["quality"]
    assert {e.path for e in model.manifest.files} >= {"model.safetensors", "classifier.json"}
    assert model.manifest.metrics["held_out_auc"] > 0.95
    audit = pads.dataset(corpus.join("audit"), format="parquet").to_table().to_pylist()
    reasons = [row["reason"] for row in audit]
    assert reasons.count("contaminated") == reasons.count("exact_duplicate") == 1
    assert 25 <= reasons.count("classify_low_score") <= 35
    assert [row["detail"] for row in audit if row["reason"] == "contaminated"] == ["tests.jsonl:1"]
    steps = {s["name"]: s["counts"] for s in json.loads(Path(corpus.join("funnel.json")).read_text())["steps"]}
    assert steps["decontaminate"]["tests.jsonl:1/documents"] == 1
    assert steps["classify"]["women/dropped"] >= 1 and steps["dedup_exact"]["women/kept"] >= 1
    report = Path(corpus.join("report.html")).read_text()
    assert "tests.jsonl:1" in report and "women" in report
    # Another evaluation set is another corpus, and only that.
    with (recipe.parent / "tests.jsonl").open("a") as handle:
        handle.write("\n" + json.dumps({"text": "another item of some eight words or more"}))
    again = {stage.name: stage for stage in plan(recipe)}
    assert again["quality"].cached and not again["corpus"].cached
    assert again["corpus"].why == ("input tests changed (files)",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("against: tests", "against: test", "reads the input 'test'"),
        ("      - classify: {model: model}\n", "", "no step reads the input 'model'"),
        (", bad: [", ", labelled: [", "cannot be trained on good, labelled"),
    ],
)
def test_wrong_inputs_are_named_before_any_work(recipe: Path, old: str, new: str, message: str) -> None:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    with pytest.raises(RecipeError, match=message):
        plan(recipe)
