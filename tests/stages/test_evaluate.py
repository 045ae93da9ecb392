"""Stage `evaluate` on a real Ray: real curated corpus, real tokens, tiny models; nothing personal is written."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from training_stage import plan, run_stage

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluate"))

from evaluate_parts import make_model, memorize, save, sentences

from modelyard.errors import DataError
from modelyard.stages.curate import CurateOptions
from modelyard.stages.evaluate import EvaluateOptions, EvaluateStage
from modelyard.stages.evaluate_privacy import how_scrubbed, originals, scanner
from modelyard.stages.tokenize import TokenizeOptions
from modelyard.storage import Artifact, InputEntry, Manifest, find_files

ADDRESSES = [f"{name}.{i}@kontor-nord.de" for i in range(10) for name in ("erika", "otto")]
OPTIONS: dict[str, Any] = {
    "kind": "evaluate", "max_sequences": 8, "samples": 1, "sample_tokens": 8,
    "privacy": {"values": 6, "context_tokens": 40, "new_tokens": 40, "free_samples": 2, "free_tokens": 8},
}  # fmt: skip


def published(
    folder: Path, kind: str, options: dict[str, Any], counts: Any = None, inputs: dict[str, InputEntry] | None = None
) -> Artifact:
    """A stage's output as the runner publishes it."""
    now = datetime.now(UTC)
    manifest = Manifest(
        stage=folder.parent.name, kind=kind, kind_version=1, fingerprint="a" * 64, recipe="test", options=options,
        inputs=inputs or {}, code_version="0", started=now, ended=now, counts=dict(counts or {}),
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(manifest.dump())
    return Artifact(str(folder), manifest)


def _documents(folder: Path) -> None:
    """Sixty documents, of which twenty hold an address each."""
    folder.mkdir()
    for i, text in enumerate(sentences(60, 5)):
        line = f"{text} Number {i}. "
        if i < len(ADDRESSES):
            line += f"Questions about order {i} go to {ADDRESSES[i]} in the morning."
        (folder / f"{i:03d}.md").write_text(line)


class Yard:
    """Published artifacts to evaluate: corpus, tokens, a fresh `base` and a `chat` that learnt addresses by heart."""

    def __init__(self, folder: Path) -> None:
        for name in ("corpus", "tokens"):
            (folder / name).mkdir()
        _documents(folder / "raw")
        self.raw = folder / "raw"
        files = find_files((str(self.raw / "*.md"),), (), None, None)
        curate = CurateOptions.model_validate({"steps": [{"normalize": {}}, {"scrub": {}}]})
        result = run_stage(curate, {"files": files}, folder / "corpus")
        recorded = curate.model_dump(mode="json")
        self.corpus = published(folder / "corpus" / "out", "curate", recorded, result.counts)
        tokenize = TokenizeOptions.model_validate(
            {"kind": "tokenize", "tokenizer": {"train": {"vocab_size": 400}}, "sequence_length": 32, "heldout": 0.2}
        )
        result = run_stage(tokenize, {"corpus": self.corpus}, folder / "tokens")
        self.tokens = published(folder / "tokens" / "out", "tokenize", {}, result.counts)
        made = folder / "tokens" / "out"
        (folder / "base" / "out").mkdir(parents=True)
        make_model(made, folder / "base" / "out" / "model")
        self.base = published(folder / "base" / "out", "pretrain", {"document_mask": True}, {"parameters": 40_000})
        model = make_model(made, folder / "chat" / "out" / "model", hidden_size=64)
        learnt = [p.read_text()[-220:] for p in sorted(self.raw.iterdir())[:20]]
        memorize(model, learnt, made, steps=60)
        save(model, made, folder / "chat" / "out" / "model")
        pairs = [{"prompt": text[:20], "completion": text[20:60]} for text in sentences(6, 9)]
        (folder / "chat" / "out" / "heldout.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
        before = {"model": InputEntry(fingerprint="a" * 64, stage="base", uri=self.base.uri)}
        self.chat = published(folder / "chat" / "out", "finetune", {"sequence_length": 32}, {"parameters": 9}, before)


@pytest.fixture(scope="module")
def yard(tmp_path_factory: pytest.TempPathFactory) -> Yard:
    from modelyard.stages import session

    session.start(2)
    return Yard(tmp_path_factory.mktemp("yard"))


def _text_of(folder: Path) -> str:
    return "".join(p.read_bytes().decode("utf-8", "replace") for p in folder.rglob("*") if p.is_file())


@pytest.mark.usefixtures("ray_session")
def test_two_models_side_by_side(yard: Yard, tmp_path: Path) -> None:
    inputs = {"model": yard.chat, "base": yard.base, "tokens": yard.tokens, "corpus": yard.corpus}
    result = run_stage(EvaluateOptions(**OPTIONS), inputs, tmp_path)
    record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    base, chat = record["models"]
    assert (base["name"], chat["name"]) == ("base", "chat")
    assert base["extraction"]["reproduced"] == {} and sum(base["extraction"]["tried"].values()) == 6
    assert chat["extraction"]["reproduced"]["email"] >= 1
    assert result.metrics["pii_reproduced"] == chat["extraction"]["reproduced"]["email"]
    assert result.metrics["base_heldout_loss"] == base["heldout_loss"] > 0
    assert result.metrics["completion_loss"] > 0 and result.metrics["base_completion_loss"] > 0
    assert record["privacy"]["values_found"] == len(ADDRESSES)
    assert result.summary.startswith("bits per byte base ") and "of 6 PII values reproduced" in result.summary
    html = (tmp_path / "out" / "report.html").read_text()
    assert "unigram entropy" in html and html.count("<svg") == 2
    everything = _text_of(tmp_path)
    assert not [address for address in ADDRESSES if address in everything]


@pytest.mark.usefixtures("ray_session")
def test_one_model_without_a_corpus(yard: Yard, tmp_path: Path) -> None:
    result = run_stage(EvaluateOptions(**OPTIONS), {"model": yard.base, "tokens": yard.tokens}, tmp_path)
    assert "pii_reproduced" not in result.metrics
    assert "completion_loss" not in result.metrics
    assert "PII not tested" in result.summary
    assert "no corpus was given" in (tmp_path / "out" / "report.html").read_text()
    again = run_stage(EvaluateOptions(**OPTIONS), {"model": yard.base, "tokens": yard.tokens}, tmp_path)
    assert again == result


@pytest.mark.usefixtures("ray_session")
def test_a_model_of_another_tokenizer_is_one_clear_error(yard: Yard, tmp_path: Path) -> None:
    make_model(Path(yard.tokens.uri), tmp_path / "made" / "out" / "model", max_position_embeddings=16)
    model = published(tmp_path / "made" / "out", "pretrain", {})
    with pytest.raises(DataError, match="longer than the model's 16") as caught:
        run_stage(EvaluateOptions(**OPTIONS), {"model": model, "tokens": yard.tokens}, tmp_path)
    assert type(caught.value) is DataError


def test_originals_come_from_raw_files_and_contexts_are_scrubbed(yard: Yard) -> None:
    found = originals(yard.corpus, wanted=5)
    assert len(found.probes) == 5 and found.unreadable == 0
    assert {value for _, value in found.known} == set(ADDRESSES)
    for probe in found.probes:
        assert probe.value in ADDRESSES
        assert "Questions about order" in probe.context and "@" not in probe.context
    assert originals(yard.corpus, wanted=5).probes == found.probes
    assert not any(address in repr(found) for address in ADDRESSES)


def test_sources_that_are_gone_are_counted(yard: Yard) -> None:
    moved = yard.raw.rename(yard.raw.with_name("moved"))
    try:
        found = originals(yard.corpus, wanted=5)
    finally:
        moved.rename(yard.raw)
    assert found.probes == () and found.unreadable == len(ADDRESSES)


def test_scrub_is_found_through_chained_curate_stages(yard: Yard, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    before = {"files": InputEntry(fingerprint="a" * 64, stage="corpus", uri=yard.corpus.uri)}
    second = published(tmp_path / "second", "curate", {"steps": [{"normalize": {}}]}, inputs=before)
    scrub, read = how_scrubbed(second)
    assert "email" in scrub.actions and read.python == "source"


def test_scanner_finds_by_form() -> None:
    assert scanner(None)([f"write to {ADDRESSES[0]}", "nothing"]) == [[("email", ADDRESSES[0])], []]


def test_files_that_are_no_model_are_refused_before_work(yard: Yard) -> None:
    options = EvaluateOptions(**OPTIONS)
    files = find_files((str(yard.raw / "*.md"),), (), None, None)
    with pytest.raises(DataError, match=r"no config\.json"):
        EvaluateStage().check(plan(options, {"model": files, "tokens": yard.tokens}))


def test_estimate_grows_with_the_model(yard: Yard) -> None:
    options = EvaluateOptions(**OPTIONS)
    estimate = EvaluateStage().estimate(plan(options, {"model": yard.base, "tokens": yard.tokens}))
    assert estimate.parameters == 40_000 and estimate.seconds is not None and estimate.seconds > 0
    unknown = EvaluateStage().estimate(plan(options, {}))
    assert unknown.seconds is None and unknown.notes


def test_option_models_are_light() -> None:
    import subprocess

    code = (
        "import sys, modelyard.stages.evaluate;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'numba') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
