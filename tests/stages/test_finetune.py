"""Stage `finetune`: from JSONL or curated pairs to a merged model, an adapter and held-out pairs."""

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

from training_stage import artifact, plan, run_stage

from modelyard.errors import DataError, RecipeError
from modelyard.models import load_model
from modelyard.stages.finetune import FinetuneOptions, FinetuneStage, _extend, read_tokenizer
from modelyard.storage import FileRef, Files
from modelyard.train.programs import pretrain
from modelyard.train.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from training_parts import pretraining, write_tokens


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a `model/` whose embeddings are trained: LoRA cannot move the logits of fresh ones."""
    folder = tmp_path_factory.mktemp("base")
    job = pretraining(write_tokens(folder / "tokens"), folder, steps=150, checkpoint_every=150)
    pretrain(job, World(0, 1, torch.device("cpu")))
    return folder


def curated(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "data" / "part-00000.parquet")
    return folder


def jsonl(path: Path, lines: list[str]) -> Files:
    path.write_text("\n".join(lines) + "\n")
    return Files((FileRef(str(path), path.stat().st_size, "x"),), "digest")


def options(**changes: Any) -> FinetuneOptions:
    values = {
        "kind": "finetune", "sequence_length": 48, "global_batch": 8, "epochs": 20, "heldout": 0.2,
        "learning_rate": 2e-2, "checkpoint_every": 50, "resources": {"workers": 1}, "adapter": {"lora": {"r": 4}},
        **changes,
    }  # fmt: skip
    return FinetuneOptions.model_validate(values)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_curated_pairs_become_a_model_that_answers(base: Path, tmp_path: Path) -> None:
    rows = [{"id": str(i), "prompt": f"count {i}", "text": "ok fine" if i % 9 else "ok " * 40} for i in range(80)]
    data = artifact(curated(tmp_path / "pairs", rows), "curate", documents=80)
    result = run_stage(options(), {"model": artifact(base, "pretrain"), "data": data}, tmp_path)
    out = tmp_path / "out"
    assert result.counts["pairs"] + result.counts["heldout_pairs"] == 80
    assert 0 < result.counts["truncated"] < 10
    assert result.counts["trainable"] < result.counts["parameters"] / 2
    assert result.metrics["heldout_loss"] < 3, "an untrained model is at ln 300 = 5.7"
    assert "pairs cut at 48 tokens" in (tmp_path / "screen.txt").read_text()
    held = [json.loads(line) for line in (out / "heldout.jsonl").read_text().splitlines()]
    assert len(held) == result.counts["heldout_pairs"]
    assert set(held[0]) == {"prompt", "completion"}
    assert {p.name for p in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert str(tmp_path) not in (out / "adapter" / "adapter_config.json").read_text()
    assert "Fine-tuning" in (out / "report.html").read_text()
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(out / "model")
    model = load_model(out / "model")
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "count 7"}], add_generation_prompt=True, return_tensors="pt"
    )
    ids = prompt if isinstance(prompt, torch.Tensor) else prompt["input_ids"]
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert words.decode(answer, skip_special_tokens=True).startswith("ok fine")


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_full_fine_tuning_from_jsonl_and_a_plain_folder(base: Path, tmp_path: Path) -> None:
    folder = Files(tuple(FileRef(str(p), 1, "x") for p in sorted((base / "model").iterdir())), "digest")
    lines = [json.dumps({"messages": [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}]})
             for i in range(12)]  # fmt: skip
    chosen = options(adapter={"lora": None}, heldout=0, steps=2, epochs=None)
    result = run_stage(chosen, {"model": folder, "data": jsonl(tmp_path / "chat.jsonl", lines)}, tmp_path)
    assert result.counts["trainable"] == result.counts["parameters"]
    assert "heldout_loss" not in result.metrics
    assert not (tmp_path / "out" / "adapter").exists()
    assert (tmp_path / "out" / "heldout.jsonl").read_text() == ""


@pytest.mark.parametrize(
    ("lines", "complaint", "place"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a"}'], "fields prompt", "chat.jsonl:2"),
        (['{"prompt": "a", "completion": ""}'], "empty answer", "chat.jsonl:1"),
        ([""], "no pairs to train on", "chat.jsonl"),
        ([json.dumps({"prompt": "a" * 100, "completion": "b"})], "no answer token|has an answer token left", ""),
    ],
)
def test_bad_pairs_are_named_with_their_row(
    base: Path, tmp_path: Path, lines: list[str], complaint: str, place: str
) -> None:
    inputs = {"model": artifact(base, "pretrain"), "data": jsonl(tmp_path / "chat.jsonl", lines)}
    with pytest.raises(DataError, match=complaint) as caught:
        run_stage(options(heldout=0), inputs, tmp_path)
    assert caught.value.place.endswith(place)


def test_bad_columns_and_folders_are_named(base: Path, tmp_path: Path) -> None:
    bare = artifact(curated(tmp_path / "corpus", [{"id": "1", "text": "t"}]), "curate", documents=1)
    with pytest.raises(DataError, match="no column prompt"):
        run_stage(options(), {"model": artifact(base, "pretrain"), "data": bare}, tmp_path)
    rows = artifact(curated(tmp_path / "rows", [{"prompt": "p", "text": ""}]), "curate", documents=1)
    with pytest.raises(DataError, match="empty answer") as caught:
        run_stage(options(), {"model": artifact(base, "pretrain"), "data": rows}, tmp_path)
    assert caught.value.place.endswith("part-00000.parquet:row 0")
    nothing = jsonl(tmp_path / "x.jsonl", ["{}"])
    with pytest.raises(DataError, match="not a model folder"):
        FinetuneStage().check(plan(options(), {"model": nothing, "data": rows}))


def test_checks_and_estimates_before_work(base: Path, tmp_path: Path) -> None:
    model = artifact(base, "pretrain")
    empty = artifact(curated(tmp_path / "none", [{"prompt": "p", "text": "t"}]), "curate", documents=0)
    with pytest.raises(DataError, match="no pairs"):
        FinetuneStage().check(plan(options(), {"model": model, "data": empty}))
    with pytest.raises(RecipeError, match="128 tokens are longer than the model's 64"):
        FinetuneStage().check(plan(options(sequence_length=128), {"model": model}))
    estimate = FinetuneStage().estimate(plan(options(steps=5, epochs=None), {"model": model}))
    assert estimate.tokens == 5 * 8 * 48
    assert estimate.parameters == 28_192
    assert FinetuneStage().estimate(plan(options(), {})).notes


def test_new_tokens_must_be_new_and_trained(base: Path) -> None:
    words = read_tokenizer(artifact(base, "pretrain"))
    known = len(words)
    assert _extend(words, ()) is None
    assert _extend(words, ("<tool>", "</tool>")) == (known, known + 2)
    assert words("<tool>", add_special_tokens=False)["input_ids"] == [known]
    with pytest.raises(RecipeError, match="has the token"):
        _extend(words, ("<|assistant|>",))
    model = {"model": artifact(base, "pretrain")}
    FinetuneStage().check(plan(options(add_tokens=["<x>"]), model))
    with pytest.raises(RecipeError, match="untrained"):
        FinetuneStage().check(plan(options(add_tokens=["<x>"], adapter={"ia3": {}}), model))


def test_learned_vectors_leave_an_adapter_alone(base: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    done = artifact(base, "pretrain")
    alone = replace(done, manifest=done.manifest.model_copy(update={"counts": {"adapter_only": 1}}))
    with pytest.raises(DataError, match="learned vectors"):
        FinetuneStage().check(plan(options(), {"model": alone}))
    broken = options(adapter={"prompt": {}}, parallel={"context": 2})
    with pytest.raises(RecipeError, match="learned vectors need whole sequences"):
        FinetuneStage().check(plan(broken, {"model": done}))
    with pytest.raises(RecipeError, match="adapters are not cut into pipeline stages"):
        FinetuneStage().check(plan(options(parallel={"pipeline": 2}), {"model": done}))
