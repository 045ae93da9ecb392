"""Process rewards: records in steps, where scores are read, the loss beside a slow reference, what steps come to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from alignment_parts import write_reward_model
from transformers import AutoModelForSequenceClassification

from modelyard.align.answered import Answered
from modelyard.align.objectives import ProcessObjective
from modelyard.align.options import RolloutOptions
from modelyard.align.reward_model import load_classifier, separator_of, write_classifier
from modelyard.align.reward_report import process_figures
from modelyard.align.rewards import RewardMix
from modelyard.align.scoring import RewardScorer
from modelyard.align.steps import StepEnds, Stepped, StepReader, cut_steps, scored_steps
from modelyard.errors import DataError
from modelyard.models.options import AdapterOptions
from modelyard.train.data import read
from modelyard.train.pairs import PackedPairs

CPU = torch.device("cpu")
ROWS: list[dict[str, Any]] = [
    {"prompt": "add", "steps": ["one", "two two", "é"], "labels": [True, False, 0.25]},
    {"prompt": "a\nb", "completions": ["x", "y"], "labels": [1, 0]},
    {"messages": [{"role": "user", "content": "q"}], "steps": [{"text": "only", "label": 1}]},
    {"prompt": "add", "steps": [{"text": "aa\n", "label": 0}, {"text": "b", "label": 0.5}]},
]


@pytest.fixture(scope="module")
def process_model(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A process reward model with a score layer drawn at random."""
    folder = tmp_path_factory.mktemp("process")
    state = dict(load_classifier(model_folder, 1).named_parameters())
    write_classifier(model_folder, AdapterOptions(lora=None), 1, state, folder, "\n")
    return folder


def examples(words: Any, length: int = 64) -> list[Stepped]:
    reader = StepReader(words, "\n", length)
    return [reader(row, f"rows:{i}") for i, row in enumerate(ROWS, 1)]


def test_packed_loss_and_gradients_equal_the_plain_classifier(model_folder: Path, words: Any) -> None:
    """One answer a row through transformers alone; the ends of steps by hand: every token is a byte."""
    model: Any = load_classifier(model_folder, seed=3).eval()
    groups, _, _ = cut_steps(examples(words), words, 64)
    data = PackedPairs.pack_groups(groups, 32, 0, 4)
    assert 1 < len(data) < len(ROWS), "several answers share a row"
    loss, metrics = ProcessObjective()(model, read(data, np.arange(len(data)), CPU))
    loss.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    wanted, right = torch.zeros(()), 0
    for example in examples(words):
        ids = example.document.ids
        start = len(ids) - len("\n".join(example.steps).encode()) - 1
        ends, at = [], start - 1
        for step in example.steps:
            at += len(step.encode()) + 1
            ends.append(at)
        assert ends[-1] == len(ids) - 1, "the last one is read at the end of the conversation"
        hidden = model.model(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).last_hidden_state[0]
        scores, labels = model.score(hidden[ends]).squeeze(-1), torch.tensor(example.labels)
        wanted = wanted - (labels * F.logsigmoid(scores) + (1 - labels) * F.logsigmoid(-scores)).sum()
        right += int(((scores >= 0) == (labels >= 0.5)).sum())
    wanted.backward()
    assert metrics["weight"] == 8
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert metrics["accuracy"] == right
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert (packed[name] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max(), name


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"labels": [1]}, "3 steps have 1 labels"),
        ({"labels": None}, "3 steps have no labels"),
        ({"labels": [1, 0, 2]}, "label of step 3 is 2"),
        ({"labels": [1, 0, math.nan]}, "label of step 3 is nan"),
        ({"labels": [1, "+", 0]}, "label of step 2 is '\\+'"),
        ({"steps": []}, "no steps"),
        ({"steps": ["a", " ", "b"]}, "step 2 is empty"),
        ({"steps": ["a", {"text": "b"}, "c"]}, "a step is no text"),
        ({"steps": ["a\nb", "c", "d"]}, "3 steps, and cut at '\\\\n' the answer has 4"),
        ({"steps": "abc"}, "a record has the fields"),
        ({"prompt": "p" * 70}, "no step ends within 64 tokens"),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_bad_records_are_named(words: Any, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        StepReader(words, "\n", 64)({**ROWS[0], **changes}, "file:7")
    assert caught.value.place == "file:7"


def test_steps_beyond_the_length_are_left_out(words: Any) -> None:
    stepped = examples(words)
    assert [e.labels for e in stepped] == [(1, 0, 0.25), (1, 0), (1,), (0, 0.5)]
    assert stepped[0].key == stepped[3].key != stepped[1].key, "answers to one prompt are held out together"
    length = len(stepped[0].document.ids) - 1
    groups, kept, counts = cut_steps(stepped, words, length)
    marks = groups[0][0].labels
    assert marks is not None
    assert marks[marks >= 0].tolist() == [1, 0]
    assert (kept, counts.truncated, counts.dropped) == ([0, 1, 2, 3], 1, 0)
    _, kept, counts = cut_steps(stepped, words, length, whole_only=True)
    assert (kept, counts.truncated, counts.dropped) == ([1, 2, 3], 0, 1)
    with pytest.raises(DataError, match="none of 4 answers fits"):
        cut_steps(stepped, words, 3, whole_only=True)


def test_ends_are_found_in_token_ids_alone() -> None:
    """Tokens that hold more than a separator, parts of one, or half a character."""
    from tokenizers import Tokenizer, decoders, models

    pieces = ["<end>", "a", "b.\n", "\n", "\n c", "-", "--", "Ã", "©"]
    made = Tokenizer(models.BPE(vocab={p.replace("\n", "Ċ").replace(" ", "Ġ"): i for i, p in enumerate(pieces)},
                                merges=[]))  # fmt: skip
    made.add_special_tokens(["<end>"])
    made.decoder = decoders.ByteLevel()
    lines, dashes = StepEnds(made, "\n"), StepEnds(made, "---")
    assert lines([3, 1, 2, 1, 3, 1, 0], 1) == [2, 4, 6], "prompt: a separator of its own; end token: the last step"
    assert lines([1, 2, 3, 3, 1], 0) == [1, 4], "empty lines are no steps"
    assert lines([1, 4, 2], 0) == [1, 2]
    assert lines([1, 3, 0], 0) == [1], "what follows the last separator is nothing"
    assert lines([7, 8, 3, 7, 8], 0) == [2, 4]
    assert dashes([1, 5, 6, 1, 6, 5, 5, 1], 0) == [2, 5, 7], "of parts"
    assert (lines([1], 1), lines([3, 0], 0)) == ([0], [1]), "there is always one"


def test_steps_of_packed_answers_are_those_one_by_one(process_model: Path, words: Any) -> None:
    texts = ["ab\nc\n\nd", "x", "", "\n\n", "first line\nlast", "cut off\n"]
    prompt = tuple(words("Q\nR", add_special_tokens=False)["input_ids"])
    bodies = [tuple(words(text, add_special_tokens=False)["input_ids"]) for text in texts]
    answers = [Answered({}, "x", "p", t, (*prompt, *body, 0), start=3) for t, body in zip(texts, bodies, strict=True)]
    plain: Any = AutoModelForSequenceClassification.from_pretrained(process_model, dtype=torch.float32).eval()
    assert separator_of(plain.config) == "\n"
    ends = [[2, 4, 7], [1], [0], [2], [10, 15], [7]]
    wanted = []
    with torch.no_grad():
        for answer, places in zip(answers, ends, strict=True):
            hidden = plain.model(input_ids=torch.tensor([answer.ids])).last_hidden_state[0]
            wanted.append(plain.score(hidden).squeeze(-1).sigmoid()[[3 + place for place in places]].tolist())
    scorer = RewardScorer(process_model, CPU, 64)
    found = scorer([(a.ids, a.start) for a in answers])
    assert [len(steps) for steps in found] == [len(places) for places in ends]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    rules: dict[str, Any] = {
        "min": min,
        "product": math.prod,
        "last": lambda s: s[-1],
        "mean": lambda s: sum(s) / len(s),
    }
    for rule, come_to in rules.items():
        source = {"kind": "reward_model", "model": "judge", "steps": rule}
        mix = RewardMix(RolloutOptions.model_validate({"rewards": [source]}), {"judge": scorer})
        assert mix(answers).total.tolist() == pytest.approx([come_to(steps) for steps in wanted], abs=1e-5)


def test_a_model_of_pairs_made_of_one_of_steps_scores_whole_answers(process_model: Path, tmp_path: Path) -> None:
    (score,) = RewardScorer(write_reward_model(process_model, tmp_path / "pairs", 2), CPU, 64)([((1, 20, 21, 22), 1)])
    assert len(score) == 1


def test_figures_of_steps() -> None:
    answers = [np.asarray(a) for a in (
        [(0.9, 1, 4), (0.2, 0, 2), (0.4, 1, 2)],  # the first wrong one is found
        [(0.6, 1, 4), (0.7, 1, 3)],  # none is, and none is found
        [(0.8, 0, 1)],  # one is missed
    )]  # fmt: skip
    found = process_figures(answers)
    assert found["first_wrong_accuracy"] == pytest.approx(2 / 3)
    assert found["accuracy_of_right"] == pytest.approx(3 / 4)
    assert found["accuracy_of_wrong"] == pytest.approx(1 / 2)
    assert found["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.6 + 0.4 + 0.3 + 0.8) / 6)
    steps = np.concatenate(answers)
    assert found["length_correlation"] == pytest.approx(np.corrcoef(steps[:, 0], steps[:, 2])[0, 1])
    assert found["position_correlation"] == pytest.approx(np.corrcoef(steps[:, 0], [0, 1, 2, 0, 1, 0])[0, 1])
    assert process_figures([]) == {}


def test_answers_are_told_apart_in_packed_rows(words: Any) -> None:
    groups, _, _ = cut_steps(examples(words), words, 64)
    packed = PackedPairs.pack_groups(groups, 32, 0, 4)
    rows = packed.batch(range(len(packed)))
    found = scored_steps(rows, np.full(rows["input_ids"].shape, 0.5))
    assert sorted(tuple(a[:, 1]) for a in found) == sorted([(1.0, 0.0, 0.25), (1.0, 0.0), (1.0,), (0.0, 0.5)])
    assert sorted(tuple(a[:, 2]) for a in found) == sorted([(4, 8, 3), (2, 2), (5,), (3, 2)])
