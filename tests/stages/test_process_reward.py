"""Stage `reward` on labelled steps: from records on disk to a model that scores steps and chooses answers."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy
from test_align import lines
from training_stage import artifact, run_stage
from transformers import AutoTokenizer

from modelyard.align.scoring import RewardScorer
from modelyard.errors import DataError
from modelyard.stages import api
from modelyard.stages.best_of import Candidate, Chooser
from modelyard.stages.inspect_data import inspect_stage
from modelyard.stages.reward import RewardStageOptions
from modelyard.storage import Artifact


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny model as a fine-tuning stage leaves it."""
    return artifact(write_policy(tmp_path_factory.mktemp("policy")).parent, "finetune")


def options(**changes: Any) -> RewardStageOptions:
    values = {"kind": "reward", "reward": {"process": {}}, "sequence_length": 48, "steps": 60, "global_batch": 8,
              "learning_rate": 1e-2, "heldout": 0.2, "adapter": {"lora": None}, "resources": {"workers": 1},
              **changes}  # fmt: skip
    return RewardStageOptions.model_validate(values)


def rows(count: int) -> list[dict[str, Any]]:
    """Steps that hold the word `no` are wrong."""
    drawn, found = random.Random(0), []
    for i in range(count):
        steps = [f"{drawn.choice('abc')}{drawn.choice(['ok', 'no'])}" for _ in range(drawn.randint(1, 4))]
        found.append({"prompt": f"say {i}", "steps": steps, "labels": ["no" not in step for step in steps]})
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_labelled_steps_become_a_model_that_chooses_by_step(policy: Artifact, tmp_path: Path) -> None:
    bad = [{"prompt": "p", "steps": ["a", "b"], "labels": [1]}, {"prompt": "p" * 90, "steps": ["a"], "labels": [1]}]
    data = lines(tmp_path / "steps.jsonl", rows(300) + bad)
    result = run_stage(options(), {"model": policy, "data": data}, tmp_path)
    assert result.counts["quarantined"] == 2
    assert result.counts["pairs"] + result.counts["heldout_pairs"] == 300
    quarantined = list(map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()))
    for row, place, reason in zip(quarantined, (301, 302), ("2 steps have 1 labels", "no step ends"), strict=True):
        assert row["place"].endswith(f"steps.jsonl:{place}")
        assert reason in row["reason"]
    figures = {name: result.metrics[f"heldout_{name}"] for name in ("accuracy", "before_accuracy", "calibration_error",
               "first_wrong_accuracy", "accuracy_of_wrong", "position_correlation", "length_correlation")}  # fmt: skip
    assert figures["accuracy"] > 0.95 > 0.75 > figures["before_accuracy"]
    assert figures["first_wrong_accuracy"] > 0.9
    assert figures["calibration_error"] < 0.1
    assert "Process reward model" in (tmp_path / "out" / "report.html").read_text()
    heldout = [json.loads(line) for line in (tmp_path / "out" / "heldout.jsonl").read_text().splitlines()]
    assert {"prompt", "steps", "labels"} == set(heldout[0])

    folder, model = tmp_path / "out" / "model", Path(policy.uri) / "model"
    words: Any = AutoTokenizer.from_pretrained(folder)
    prompt = words.apply_chat_template([{"role": "user", "content": "say 7"}], add_generation_prompt=True,
                                       return_dict=False)  # fmt: skip
    answers = ["aok\nbno\ncok", "aok\nbok\ncok", "ano"]
    drawn = [Candidate((*words(text, add_special_tokens=False)["input_ids"], 0), True) for text in answers]
    scores = Chooser(model, folder, "min").scores(prompt, drawn)
    assert [score > 0.5 for score in scores] == [False, True, False]
    assert Chooser(model, folder, "last").scores(prompt, drawn)[0] > 0.5
    (steps,) = RewardScorer(folder, torch.device("cpu"), 1)([((*prompt, *drawn[0].tokens), len(prompt))])
    assert [step > 0.5 for step in steps] == [True, False, True]


def test_too_many_bad_rows_end_the_stage_with_the_first(policy: Artifact, tmp_path: Path) -> None:
    data = lines(tmp_path / "steps.jsonl", [*rows(5), {"prompt": "p", "steps": ["a"], "labels": [-1]}])
    with pytest.raises(DataError, match="label of step 1 is -1") as caught:
        run_stage(options(), {"model": policy, "data": data}, tmp_path)
    assert caught.value.place.endswith("steps.jsonl:6")


def test_where_scores_are_read_is_shown(policy: Artifact, tmp_path: Path) -> None:
    data = tmp_path / "steps.jsonl"
    lines(data, [{"prompt": "say", "steps": ["aok", "bno"], "labels": [1, 0.5]}])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: steps\nroot: {tmp_path}/root\nstages:\n  judge:\n    kind: reward\n    reward: {{process: {{}}}}\n"
        f'    inputs: {{model: ["{policy.uri}/model/*"], data: ["{data}"]}}\n    sequence_length: 64\n'
    )
    (shown,) = inspect_stage(api.load(recipe, []), "judge", 3)
    assert [text for text, learnt in shown.runs if learnt] == ["[1]\n", "[0.5]<|endoftext|>"]
    assert "".join(text for text, _ in shown.runs).endswith("aok[1]\nbno[0.5]<|endoftext|>")
    assert (shown.learnt, shown.cut) == (2, 0)
