"""The loop in one process: equal losses however a batch is cut, exact resume, and named errors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_parts import TINY, pretraining, write_tokens

from modelyard import storage
from modelyard.errors import DataError, RecipeError, ResourceError, StorageError
from modelyard.models import ModelOptions, load_model
from modelyard.tokens.tokenizer import extend_tokenizer
from modelyard.train.guard import DivergedError
from modelyard.train.loop import Job, Outcome, fit
from modelyard.train.metrics import StepMetrics
from modelyard.train.objective import causal_lm
from modelyard.train.optimizer import make_optimizer
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.programs import PretrainJob, pretrain
from modelyard.train.world import World

ALONE = World(0, 1, torch.device("cpu"))


class Stop(Exception):
    """Stands for a crash."""


def crash_after(step: int) -> Callable[[StepMetrics], None]:
    def sink(metrics: StepMetrics) -> None:
        if metrics.step == step:
            raise Stop

    return sink


def losses(outcome: Outcome) -> list[float]:
    return [row["loss"] for row in outcome.history]


@pytest.fixture(scope="module")
def whole(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return pretrain(pretraining(tokens, tmp_path_factory.mktemp("whole")), ALONE)


def test_it_learns_and_writes_a_model(tokens: Path, tmp_path: Path) -> None:
    seen: list[StepMetrics] = []
    job = pretraining(tokens, tmp_path, steps=60, evaluate_every=20, evaluate_sequences=8)
    outcome = pretrain(job, ALONE, seen.append)
    assert outcome.heldout_loss is not None
    assert outcome.heldout_loss < losses(outcome)[0] - 0.3
    assert [m.step for m in seen] == list(range(1, 61))
    assert [m.step for m in seen if "heldout_loss" in m.extra] == [20, 40, 60]
    assert seen[-1].tokens == 60 * 8 * 32
    assert seen[0].eta > seen[-1].eta == 0
    model = load_model(tmp_path / "model")
    assert model.config.vocab_size == 300
    assert (tmp_path / "model" / "tokenizer.json").exists()
    assert model.generation_config.eos_token_id == 0


def test_micro_batches_do_not_change_the_losses(tokens: Path, tmp_path: Path, whole: Outcome) -> None:
    for size in (1, 3, 8):
        other = pretrain(pretraining(tokens, tmp_path / str(size), micro_batch=size), ALONE)
        assert losses(other) == pytest.approx(losses(whole), abs=1e-5)


@pytest.mark.parametrize("step", [2, 7, 12])
def test_resumes_exactly_after_a_crash(tokens: Path, tmp_path: Path, whole: Outcome, step: int) -> None:
    job = pretraining(tokens, tmp_path)
    with pytest.raises(Stop):
        pretrain(job, ALONE, crash_after(step))
    said: list[str] = []
    resumed = pretrain(job, ALONE, say=said.append)
    assert losses(resumed) == losses(whole), "bit-identical, every step once"
    assert resumed.heldout_loss == whole.heldout_loss
    assert bool(said) == (step > 4), "there was a checkpoint after step 4"


@pytest.mark.parametrize("damage", ["flip", "cut", "no marker", "half marker", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    tokens: Path, tmp_path: Path, whole: Outcome, damage: str
) -> None:
    job = pretraining(tokens, tmp_path)
    with pytest.raises(Stop):
        pretrain(job, ALONE, crash_after(11))
    newest = tmp_path / "checkpoints" / "step-00000008"
    data, marker = newest / "__0_0.distcp", newest / "complete.json"
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(data.read_bytes()[:-10])
    elif damage == "missing":
        (newest / ".metadata").unlink()
    elif damage == "half marker":
        marker.write_text(marker.read_text()[:40])
    else:
        marker.unlink()
    said: list[str] = []
    resumed = pretrain(job, ALONE, say=said.append)
    assert "trying the one before" in said[0]
    assert "resumed from step-00000004" in said[1]
    assert losses(resumed) == losses(whole)


def test_only_the_last_checkpoints_are_kept(tokens: Path, tmp_path: Path) -> None:
    pretrain(pretraining(tokens, tmp_path, checkpoint_every=2, keep_checkpoints=3), ALONE)
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000008", "step-00000010", "step-00000012"]


def test_checkpoints_of_another_architecture_are_refused(tokens: Path, tmp_path: Path) -> None:
    job = pretraining(tokens, tmp_path)
    pretrain(job, ALONE)
    assert job.model is not None
    other = job.model_copy(update={"model": job.model.model_copy(update={"hidden_size": 64})})
    with pytest.raises(DataError, match="belongs to llama hidden_size=32"):
        pretrain(other, ALONE)


def test_checkpoints_on_s3(tokens: Path, tmp_path: Path, whole: Outcome, moto_server: str) -> None:
    uri = f"s3://yard/{tmp_path.name}"
    job = pretraining(tokens, tmp_path).model_copy(update={"checkpoints": f"{uri}/work", "output": f"{uri}/model"})
    with pytest.raises(Stop):
        pretrain(job, ALONE, crash_after(6))
    said: list[str] = []
    assert losses(pretrain(job, ALONE, say=said.append)) == losses(whole)
    assert "resumed from step-00000004" in said[0]
    assert {name for name, _ in storage.list_files(f"{uri}/model")} >= {"config.json", "model.safetensors"}


def test_warm_start_continues_from_the_weights(tokens: Path, tmp_path: Path) -> None:
    first = pretrain(pretraining(tokens, tmp_path / "a", steps=40), ALONE)
    update = {"model": None, "start": str(tmp_path / "a" / "model")}
    second = pretrain(pretraining(tokens, tmp_path / "b", steps=3).model_copy(update=update), ALONE)
    assert losses(second)[0] < losses(first)[0] - 0.3
    # Another shape: one block more, a wider vocabulary. What fits is taken, the rest is said and stays fresh.
    other = TINY.model_copy(update={"num_hidden_layers": 3, "vocab_size": 310})
    warm = pretraining(tokens, tmp_path / "c", steps=1).model_copy(update={**update, "model": other})
    said: list[str] = []
    third = pretrain(warm, ALONE, say=said.append)
    assert "19 tensors taken over; 1 of another shape (model.embed_tokens.weight 300x32 for 310x32)" in said[0]
    assert "9 not there, kept as initialised" in said[0]
    assert third.loss > losses(second)[0]
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    stranger = warm.model_copy(update={"model": ModelOptions(config=config)})
    with pytest.raises(DataError, match="nothing of it fits the model"):
        pretrain(stranger, ALONE)


def test_a_vocabulary_that_was_extended_gets_rows(tokens: Path, tmp_path: Path) -> None:
    base = tmp_path / "a" / "model"
    pretrain(pretraining(tokens, tmp_path / "a", steps=1), ALONE)
    extended = shutil.copytree(tokens, tmp_path / "extended")
    extend_tokenizer(extended / "tokenizer", ["newword"], [])
    for side in ("train", "heldout"):
        place = extended / side / "index.json"
        place.write_text(place.read_text().replace('"vocab_size":300', '"vocab_size":302').replace(
            '"vocab_size": 300', '"vocab_size": 302'))  # fmt: skip
    job = pretraining(extended, tmp_path / "b", steps=1).model_copy(update={"model": None, "start": str(base)})
    said: list[str] = []
    pretrain(job, ALONE, say=said.append)
    assert "2 rows added to the embeddings" in said[0]
    assert load_model(tmp_path / "b" / "model").config.vocab_size == 302
    words = json.loads((extended / "tokenizer" / "tokenizer.json").read_text())
    words["model"]["vocab"]["a"], words["model"]["vocab"]["b"] = 40, 41
    (extended / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(DataError, match="not an extension of the model's") as caught:
        pretrain(job, ALONE)
    assert "tokenizer" in caught.value.mend


def parts(tokens: Path, objective: Any, **options: Any) -> Job:
    from modelyard.models import build_config, build_on_meta, initialise
    from modelyard.models.build import materialise
    from modelyard.tokens import TokenDataset

    model = build_on_meta(build_config(TINY, 300))
    materialise(model, ALONE.device)
    initialise(model, 0)
    chosen = TrainOptions(**{"steps": 6, "global_batch": 4, "learning_rate": 1e-2, **options})
    return Job(model, make_optimizer(model, chosen), objective, TokenDataset.open(tokens / "train"), 32, chosen)


def test_a_loss_that_is_no_number_is_skipped_then_fatal(tokens: Path) -> None:
    calls = 0

    def sometimes(bad: set[int]) -> Any:
        def objective(model: Any, batch: Any) -> Any:
            nonlocal calls
            calls += 1
            loss, metrics = causal_lm(model, batch)
            return (loss * float("nan") if calls in bad else loss), metrics

        return objective

    job, said = parts(tokens, sometimes({3})), []
    job.say = said.append
    outcome = fit(job, ALONE)
    assert outcome.skipped == 1
    assert said == ["step 3: update left out, loss nan, gradient norm nan"]
    assert all(value == value for value in losses(outcome)[3:])
    calls = 0
    with pytest.raises(DivergedError, match="at step 1"):
        fit(parts(tokens, sometimes({1})), ALONE)
    calls = 0
    with pytest.raises(DivergedError, match="2 in a row"):
        fit(parts(tokens, sometimes({2, 3, 4}), bad_steps=1), ALONE)


def test_an_objective_may_be_anything_of_the_right_shape(tokens: Path) -> None:
    def with_penalty(model: Any, batch: Any) -> Any:
        loss, metrics = causal_lm(model, batch)
        return loss * 2, {**metrics, "half": loss.detach()}

    outcome = fit(parts(tokens, with_penalty), ALONE)
    assert outcome.history[0]["half"] == pytest.approx(outcome.history[0]["loss"] / 2, rel=1e-6)

    def unreduced(model: Any, batch: Any) -> Any:
        return model(input_ids=batch["input_ids"]).logits, {"weight": torch.ones(())}

    with pytest.raises(RecipeError, match="unreduced returned a loss that is not a scalar"):
        fit(parts(tokens, unreduced), ALONE)


def test_clipping_acts_only_above_its_bound(tokens: Path) -> None:
    plain = losses(fit(parts(tokens, causal_lm, clip=None), ALONE))
    assert losses(fit(parts(tokens, causal_lm, clip=1e6), ALONE)) == plain
    # AdamW undoes a constant factor; only epsilon shows that gradients were scaled down.
    assert losses(fit(parts(tokens, causal_lm, clip=1e-7), ALONE)) != plain


def test_bad_tokens_are_named(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token shard"):
        pretrain(pretraining(tmp_path / "none", tmp_path), ALONE)
    damaged = write_tokens(tmp_path / "damaged", 10, 5)
    shard = next((damaged / "train").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[5] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match="checksum"):
        pretrain(pretraining(damaged, tmp_path), ALONE)
    small = TINY.model_copy(update={"vocab_size": 299})
    with pytest.raises(DataError, match="vocabulary of 300"):
        pretrain(pretraining(tokens, tmp_path).model_copy(update={"model": small}), ALONE)
    short = TINY.model_copy(update={"max_position_embeddings": 16})
    with pytest.raises(RecipeError, match="longer than the model's 16"):
        pretrain(pretraining(tokens, tmp_path).model_copy(update={"model": short}), ALONE)


def test_a_layout_that_does_not_fit_is_named(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="there are 1 workers"):
        pretrain(pretraining(tokens, tmp_path, parallel=ParallelOptions(data=2)), ALONE)


def test_unwritable_checkpoints_are_an_error_not_a_silence(tokens: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file, not a folder")
    with pytest.raises((OSError, StorageError)):
        pretrain(pretraining(tokens, tmp_path), ALONE)


def test_jobs_survive_json(tokens: Path, tmp_path: Path) -> None:
    job = pretraining(tokens, tmp_path)
    assert PretrainJob.model_validate(json.loads(job.model_dump_json())) == job
