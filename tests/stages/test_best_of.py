"""Best of n: the answer kept is the one the reward model likes best, and configurations that cannot be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy
from training_stage import artifact
from training_stage import plan as plan_context

from modelyard.align.encode import after_answer
from modelyard.align.reward_model import load_classifier, write_classifier
from modelyard.align.scoring import RewardScorer
from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, Tokenizer, generate
from modelyard.errors import RecipeError
from modelyard.models.options import AdapterOptions
from modelyard.stages.generate import GenerateOptions, GenerateStage
from modelyard.stages.generate_units import plan, read_rows
from modelyard.stages.generate_worker import Writer
from modelyard.storage import Artifact

ENGINE = {"max_sequences": 4, "threads": 1, "precision": "float32"}
ROWS = [{"prompt": f"say {letter}"} for letter in "abc"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reward model."""
    policy, reward = write_policy(tmp_path_factory.mktemp("policy")), tmp_path_factory.mktemp("reward") / "model"
    state = dict(load_classifier(policy, 1).named_parameters())
    write_classifier(policy, AdapterOptions(lora=None), 1, state, reward)
    return policy, reward


def options(**changes: Any) -> GenerateOptions:
    settings = {"sampling": {"max_tokens": 6, "temperature": 1.0, "seed": 5}, "best_of": {"answers": 4}}
    return GenerateOptions.model_validate(settings | changes)


def by_hand(policy: Path, reward: Path) -> list[tuple[str, float]]:
    """Text and score of the best of four answers to every row, drawn by an engine of its own."""
    from transformers import AutoTokenizer

    engine, words = EngineCore(policy, EngineOptions.model_validate(ENGINE)), Tokenizer(policy)
    scorer, after = RewardScorer(reward, torch.device("cpu"), 1), after_answer(AutoTokenizer.from_pretrained(policy))
    found = []
    for number, row in enumerate(ROWS):
        ids = tuple(words.encode_chat([{"role": "user", "content": row["prompt"]}]))
        requests = [Request(str(i), ids, Sampling(6, 1.0, seed=5 + 4 * number + i)) for i in range(4)]
        outputs = [completion.output for completion in generate(engine, requests)]
        talks = [(*ids, *o.tokens, *(after if o.finish == "stop" else ())) for o in outputs]
        scores = [min(scorer([(talk, len(ids))])[0]) for talk in talks]
        best = max(range(4), key=lambda i: scores[i])
        assert len({o.text for o in outputs}) > 1, "answers that differ"
        found.append((outputs[best].text, float(scores[best])))
    return found


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_best_answer_is_kept_with_its_score(models: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    policy, reward = models
    path = tmp_path / f"rows.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    how = options().model_dump(include={"prompt", "messages", "system", "chat", "output", "sampling"})
    writer = Writer(str(policy), ENGINE, how, f"{tmp_path}/out", f"{tmp_path}/done", (str(reward), 4, "min"))
    (unit,) = plan([str(path)], 100, "generated", scored=True)
    record = writer.work(unit)
    writer._engine.close()
    assert record["errors"] == 0
    (written,) = plan([str(tmp_path / "out" / unit.part)], 100, "other")
    rows = [row for row in read_rows(written) if isinstance(row, dict)]
    wanted = by_hand(policy, reward)
    assert [row["generated"] for row in rows] == [text for text, _ in wanted]
    assert [row["generated_score"] for row in rows] == pytest.approx([score for _, score in wanted], abs=1e-4)


def test_configurations_that_cannot_be(models: tuple[Path, Path], tmp_path: Path) -> None:
    policy, reward = models
    given = {"model": artifact(policy.parent, "align"), "reward": artifact(reward.parent, "reward")}

    def check(chosen: GenerateOptions, names: tuple[str, ...], **more: Artifact) -> None:
        GenerateStage().check(plan_context(chosen, {name: (given | more)[name] for name in names}))

    check(options(), ("model", "reward"))
    with pytest.raises(RecipeError, match="go together"):
        check(options(), ("model",))
    with pytest.raises(RecipeError, match="go together"):
        check(options(best_of=None), ("model", "reward"))
    with pytest.raises(RecipeError, match="all answers are the same"):
        check(options(sampling={}), ("model", "reward"))
    described = json.loads((reward / "tokenizer.json").read_text())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((reward / "config.json").read_bytes())
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(RecipeError, match="another tokenizer"):
        check(options(), ("model", "reward"), reward=artifact(tmp_path, "reward"))
