"""Stages `align` and `reward`: from records on disk over Ray Train workers to models, and every bad input by name."""

from __future__ import annotations

import gzip
import json
import sys
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "align"))

from alignment_parts import write_policy
from training_stage import artifact, plan, run_stage

from modelyard.errors import DataError, RecipeError
from modelyard.planner.estimate import Estimate
from modelyard.stages import api
from modelyard.stages.align import AlignOptions, AlignStage
from modelyard.stages.examples import read_records
from modelyard.stages.import_model import import_model
from modelyard.stages.inspect_data import inspect_stage
from modelyard.stages.reward import RewardStageOptions
from modelyard.stages.rollout_stage import curve_names
from modelyard.storage import Artifact, FileRef, Files

PIPELINES = Path(__file__).parents[2] / "pipelines"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A tiny model as a fine-tuning stage leaves it."""
    return artifact(write_policy(tmp_path_factory.mktemp("policy")).parent, "finetune")


def files(path: Path) -> Files:
    return Files((FileRef(str(path), path.stat().st_size, "x"),), "digest")


def lines(path: Path, rows: list[Any]) -> Files:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files(path)


def options(**changes: Any) -> AlignOptions:
    values = {"kind": "align", "sequence_length": 48, "steps": 8, "global_batch": 8, "learning_rate": 1e-2,
              "heldout": 0.2, "adapter": {"lora": {"r": 4}}, "resources": {"workers": 1}, **changes}  # fmt: skip
    return AlignOptions.model_validate(values)


def pair(i: int) -> dict[str, Any]:
    return {"prompt": f"say {i}", "chosen": "ok" * (1 + i % 3), "rejected": "no" * (1 + i % 2)}


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_preferences_become_an_aligned_model(policy: Artifact, tmp_path: Path) -> None:
    rows = [pair(i) for i in range(199)] + [{"prompt": "p", "chosen": "same", "rejected": "same"}]
    path = tmp_path / "pairs.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    result = run_stage(options(resources={"workers": 2}), {"model": policy, "data": files(path)}, tmp_path)
    assert result.counts["pairs"] + result.counts["heldout_pairs"] == 199
    assert result.counts["quarantined"] == 1
    assert result.metrics["heldout_accuracy"] > 0.9
    assert result.metrics["heldout_before_accuracy"] == 0.5
    (bad,) = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert bad["place"].endswith("pairs.jsonl.gz:200")
    assert "chosen equals rejected" in bad["reason"]
    assert "1 records cannot be used" in (tmp_path / "screen.txt").read_text()
    assert "Held-out, before and after" in (tmp_path / "out" / "report.html").read_text()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_opinions_of_a_server_train_kto_and_rewards_a_classifier(policy: Artifact, tmp_path: Path) -> None:
    opinions = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "completion": "ok" if i % 2 else "no",
            "label": bool(i % 2),
        }
        for i in range(60)
    ]
    pq.write_table(pa.Table.from_pylist(opinions), tmp_path / "feedback.parquet")
    inputs = {"model": policy, "data": files(tmp_path / "feedback.parquet")}
    found = run_stage(options(method="kto", heldout=0, steps=4), inputs, tmp_path / "kto")
    assert found.counts["pairs"] == 60
    fields = set(RewardStageOptions.model_fields)
    chosen = RewardStageOptions.model_validate(options().model_dump(include=fields) | {"kind": "reward"})
    data = lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(100)])
    result = run_stage(chosen, {"model": policy, "data": data}, tmp_path / "reward")
    assert result.metrics["heldout_accuracy"] > 0.9
    assert json.loads((tmp_path / "reward" / "out" / "model" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_policy_learns_from_rewards_of_its_answers(policy: Artifact, tmp_path: Path) -> None:
    data = lines(tmp_path / "prompts.jsonl", [{"prompt": chr(97 + i % 26), "answer": "x"} for i in range(30)])
    rollouts = {"group": 4, "max_tokens": 5, "rows": 64, "rewards": [{"kind": "regex", "pattern": "[a-m]"}]}
    chosen = options(method="grpo", rollouts=rollouts, engine={"max_sequences": 8}, global_batch=2, steps=4)
    result = run_stage(chosen, {"model": policy, "data": data}, tmp_path)
    assert {"reward", "first_reward", "heldout_reward", "heldout_before_reward"} <= set(result.metrics)
    assert result.counts["prompts"] + result.counts["heldout_prompts"] == 30
    report = (tmp_path / "out" / "report.md").read_text()
    for title in ("Where the time went", "What the model writes", "Predicted against measured"):
        assert f"## {title}" in report
    assert "| wall time |" in report
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


def rewarded(reward: dict[str, Any], **rollouts: Any) -> dict[str, Any]:
    return {"method": "grpo", "rollouts": {"rewards": [reward], **rollouts}}


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("rows", "changes", "complaint", "place"),
    [
        ([GOOD, {**GOOD, "rejected": "a"}], {}, "chosen equals rejected", "pairs.jsonl:2"),
        ([{**GOOD, "chosen": ""}], {}, "chosen answer is empty", "pairs.jsonl:1"),
        ([GOOD, "text"], {}, "not a JSON object", "pairs.jsonl:2"),
        ([{**GOOD, "prompt": "p" * 100}], {}, "has an answer token left", "sequence_length"),
        ([{"prompt": "p", "completion": "a"}], {}, "fields completion, prompt", "pairs.jsonl:1"),
        ([{"prompt": "p", "completion": "a", "label": 3}], {"method": "kto"}, "label is 3", "pairs.jsonl:1"),
        ([], {}, "no pairs to train on", "pairs.jsonl"),
    ],
)
def test_bad_rows_end_the_stage_with_their_place(
    policy: Artifact, tmp_path: Path, rows: list[Any], changes: dict[str, Any], complaint: str, place: str
) -> None:
    inputs = {"model": policy, "data": lines(tmp_path / "pairs.jsonl", rows)}
    with pytest.raises(DataError, match=complaint) as caught:
        run_stage(options(heldout=0, **changes), inputs, tmp_path)
    assert caught.value.place.endswith(place)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"adapter": {"lora": None}, "preference": {"reference": "adapter"}}, "no adapter to switch off"),
        ({"objective": "causal_lm"}, "objective has no meaning here"),
        ({"parallel": {"pipeline": 2}, "resources": {"workers": 2}}, "whole sequences and layers"),
        ({"sequence_length": 500}, "longer than the model's"),
        ({"method": "grpo"}, "nothing rewards the answers"),
        ({"method": "grpo", "rollouts": {"rewards": [{"kind": "exact"}], "updates": 3}}, "resumed exactly"),
        (rewarded({"kind": "reward_model", "model": "rm"}), "no reward model 'rm'"),
        (rewarded({"kind": "exact"}, kl=0.1, reference={"count": 1}), "adapter switched off, which needs no actor"),
        ({**rewarded({"kind": "exact"}, reference={"count": 1}), "adapter": {"lora": None}}, "nobody asks the refer"),
        (rewarded({"kind": "exact"}, reward_models={"count": 1}), "no reward model is named"),
        ({**rewarded({"kind": "exact"}), "method": "ppo", "ppo": {"kl_target": 6}}, "no KL penalty to steer"),
        (rewarded({"kind": "judge", "url": "http://judge/v1", "model": "m", "key": "NO_SUCH_KEY"}), "KEY is not set"),
    ],
)
def test_broken_configurations_fail_before_work(policy: Artifact, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        AlignStage().check(plan(options(**changes), {"model": policy}))


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("x.jsonl.gz", b"plain", "cannot be unpacked"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be unpacked"),
        ("x.jsonl", '{"prompt": "\u00e4"}'.encode("latin-1"), "not UTF-8"),
        ("x.json", b"[{]", "not JSON"),
        ("x.parquet", b"PAR", "cannot be read as Parquet"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=complaint) as caught:
        list(read_records(files(tmp_path / name)))
    assert caught.value.place.endswith(name)


def test_the_report_draws_what_there_is() -> None:
    history = [{"step": 1, "reward": 0.1, "multiplier/regex_1": 1.0, "loss": 2.0}, {"step": 2, "reward/regex_1": 0.5}]
    assert curve_names(history) == ["reward", "multiplier/regex_1", "reward/regex_1"]


def test_reward_models_must_be_such_and_used(policy: Artifact) -> None:
    chosen = options(method="grpo", rollouts={"rewards": [{"kind": "reward_model", "model": "rm"}]})
    with pytest.raises(RecipeError, match="no reward model but LlamaForCausalLM"):
        AlignStage().check(plan(chosen, {"model": policy, "rm": policy}))
    with pytest.raises(RecipeError, match="nothing uses the input 'rm'"):
        AlignStage().check(plan(options(), {"model": policy, "rm": policy}))


def test_a_template_must_be_there(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "bare")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    inputs = {"model": artifact(folder.parent, "finetune"), "data": lines(tmp_path / "pairs.jsonl", [GOOD])}
    with pytest.raises(DataError, match="no chat template"):
        run_stage(options(heldout=0), inputs, tmp_path)


@pytest.mark.parametrize(
    "name",
    ["preference_dpo", "rlhf_grpo", "rlhf_ppo", "safety", "rejection_sampling", "instruct_lora", "self_instruct"],
)
def test_the_recipes_are_planned(policy: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(PIPELINES.parent)
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path))
    monkeypatch.setenv("MODELYARD_MODEL", policy.uri + "/model")
    short = {"preference_dpo": ["aligned.sequence_length=96"], "rlhf_grpo": ["policy.sequence_length=96"],
             "instruct_lora": ["chat.sequence_length=96"], "self_instruct": ["learnt.sequence_length=96"],
             "safety": [f"{name}.sequence_length=64"
                        for name in ("distilled", "safe", "helpful", "harmless", "policy")],
             "rejection_sampling": ["judge.sequence_length=64", "better.sequence_length=96"],
             "rlhf_ppo": [f"{name}.sequence_length=64" for name in ("chat", "judge", "policy")]}  # fmt: skip
    stages = api.plan(api.load(PIPELINES / f"{name}.yaml", short[name]))
    assert [stage.cached for stage in stages] == [False] * len(stages)
    trained = [stage.estimate for stage in stages if stage.kind in ("finetune", "reward", "align")]
    # Also where the model is that of a stage which has yet to run.
    assert {estimate.parameters for estimate in trained} == {28_192}
    assert all(e.memory_bytes and (e.seconds or "a step takes" in " ".join(e.notes)) for e in trained)


def test_the_plan_of_rollouts_counts_writing_scoring_and_roles(policy: Artifact) -> None:
    def planned(**changes: Any) -> Estimate:
        rollouts = {"group": 4, "max_tokens": 8, "rows": 64, "rewards": [{"kind": "exact"}]} | changes
        chosen = options(method="grpo", rollouts=rollouts, steps=6, global_batch=2, adapter={"lora": None})
        return AlignStage().estimate(plan(chosen, {"model": policy}))

    plain, scored, longer = planned(), planned(kl=0.1), planned(max_tokens=16)
    assert plain.seconds is not None
    assert scored.seconds is not None
    assert longer.seconds is not None
    assert plain.seconds < min(scored.seconds, longer.seconds)
    assert (plain.flops or 0) < (scored.flops or 0) < 3 * (plain.flops or 0)
    assert "engine" in dict(plain.memory_parts)
    assert dict(scored.memory_parts)["reference"] == 4 * (plain.parameters or 0)
    assert "engine" not in dict(planned(engines={"count": 1}).memory_parts)
    assert any("writing" in note and "scoring" not in note for note in plain.notes)
    assert any("scoring" in note for note in scored.notes)


def test_a_plan_of_epochs_guesses_or_says_what_a_step_takes(policy: Artifact, tmp_path: Path) -> None:
    data = lines(tmp_path / "pairs.jsonl", [pair(i) for i in range(400)])
    guessed = AlignStage().estimate(plan(options(steps=None), {"model": policy, "data": data}))
    assert guessed.seconds
    assert any("guessed" in note for note in guessed.notes)
    unknown = AlignStage().estimate(plan(options(steps=None), {"model": policy}))
    assert unknown.seconds is None
    assert unknown.memory_bytes
    assert any("a step takes" in note for note in unknown.notes)


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"learning_rate": 3.0}, "learning_rate 3 is far above"),
        ({"learning_rate": 1e-9}, "learning_rate 1e-09 is so low"),
        ({"clip": None, "warmup": 0}, "the first steps may diverge"),
        ({}, ""),
    ],
)
def test_rates_that_look_like_mistakes_are_named_in_the_plan(
    policy: Artifact, changes: dict[str, Any], warning: str
) -> None:
    notes = "; ".join(AlignStage().estimate(plan(options(**changes), {"model": policy})).notes)
    assert warning in notes
    assert bool(warning) == any(sign in notes for sign in ("far above", "so low", "may diverge"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_the_toy_line_of_rlhf_runs(policy: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three training stages one after the other: the only test that a reward stage's output rewards a policy."""
    monkeypatch.chdir(PIPELINES.parent)
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path))
    monkeypatch.setenv("MODELYARD_MODEL", policy.uri + "/model")
    text = (PIPELINES / "rlhf_ppo.yaml").read_text()
    words = next(line for line in text.split("\n") if "--set chat.steps" in line).split()
    changes = [value for flag, value in pairwise(words) if flag == "--set"]
    found = api.run(api.load(PIPELINES / "rlhf_ppo.yaml", changes)).artifacts
    metrics = found["policy"].manifest.metrics
    assert {"heldout_reward", "heldout_before_reward", "reward"} <= set(metrics)
    report = found["policy"].local("report.md").read_text()
    assert "PPO: policy" in report
    assert (found["policy"].local("value_head.safetensors")).exists()


def test_what_is_learnt_is_shown(policy: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PIPELINES.parent)
    monkeypatch.setenv("MODELYARD_ROOT", str(tmp_path))
    monkeypatch.setenv("MODELYARD_MODEL", policy.uri + "/model")
    recipe = api.load(PIPELINES / "preference_dpo.yaml", ["aligned.sequence_length=96"])
    chosen, rejected = inspect_stage(recipe, "aligned", 2)
    assert chosen.title.endswith("brevity.jsonl:1, chosen")
    first = json.loads((PIPELINES / "data" / "brevity.jsonl").read_text().splitlines()[0])
    assert "".join(text for text, learnt in chosen.runs if learnt) == first["chosen"] + "<|endoftext|>"
    assert rejected.cut > 0
    assert rejected.tokens == 96
    with pytest.raises(RecipeError, match="no stage 'nothing'"):
        inspect_stage(recipe, "nothing", 1)


def test_models_are_brought_in(policy: Artifact, tmp_path: Path) -> None:
    source = Path(policy.uri) / "model"
    (source / "pytorch_model.bin").write_bytes(b"pickled")
    found = import_model(str(source), tmp_path / "copy")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in found.iterdir()}
    assert not (found / "pytorch_model.bin").exists()
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("a.txt", "nothing")
    for given, complaint in (
        (str(tmp_path), "not a model folder"), (str(tmp_path / "empty.whl"), "holds 0 .gguf"),
        ("no-such-package", "neither a folder"), (str(tmp_path / "no.gguf"), "no such file"), ("rich", "holds 0 .gguf"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=complaint):
            import_model(given, tmp_path / "new")
    with pytest.raises(DataError, match="the folder exists"):
        import_model(str(source), found)
