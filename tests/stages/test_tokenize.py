"""Stage `tokenize` on a real Ray: its artifact, resumption, independence of workers, and bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from modelyard.errors import DataError
from modelyard.recipe import Resources
from modelyard.stages.base import StageContext, StageResult
from modelyard.stages.progress import Display, Progress
from modelyard.stages.tokenize import TokenizeOptions, TokenizeStage
from modelyard.storage import Artifact, Manifest, exists, join, list_files, read_bytes
from modelyard.tokens import TokenDataset

WORDS = ["the", "model", "data", "reads", "writes", "token", "shard", "seed", "order", "file", "every", "never"]


def make_corpus(folder: Path, rows: int = 300, files: int = 3, text: str | None = None) -> Artifact:
    """A curate artifact of `rows` documents in `files` Parquet files."""
    rng = np.random.default_rng(0)
    texts = [text if text is not None else " ".join(rng.choice(WORDS, 60)) for _ in range(rows)]
    table = pa.table({"id": [f"d{i}" for i in range(rows)], "text": pa.array(texts, pa.string())})
    (folder / "data").mkdir(parents=True)
    for n in range(files):
        pq.write_table(table.slice(n * rows // files, (n + 1) * rows // files - n * rows // files),
                       folder / "data" / f"part-{n:05d}.parquet")  # fmt: skip
    now = datetime.now(UTC)
    manifest = Manifest(
        stage="corpus", kind="curate", kind_version=1, fingerprint="0" * 64, recipe="r", options={}, inputs={},
        code_version="0", started=now, ended=now, counts={"documents": rows, "bytes": sum(map(len, texts))},
    )  # fmt: skip
    return Artifact(str(folder), manifest)


@contextmanager
def _quiet() -> Iterator[Progress]:
    with Display() as display:
        yield Progress(display, "tokens")


def run(corpus: Artifact | dict[str, Artifact], folder: str, **options: Any) -> StageResult:
    """Runs the stage as the runner does, without MLflow; one corpus is the source `corpus`."""
    inputs = {"corpus": corpus} if isinstance(corpus, Artifact) else corpus
    settings = {"tokenizer": {"train": {"vocab_size": 400}}, "sequence_length": 64, "heldout": 0.1} | options
    with _quiet() as progress:
        ctx = StageContext(
            name="tokens", recipe="r", options=TokenizeOptions(kind="tokenize", **settings), fingerprint="1" * 64,
            root=folder, inputs=inputs, output=join(folder, "out"), work=join(folder, "work"),
            run=SimpleNamespace(), progress=progress,  # type: ignore[arg-type]
        )  # fmt: skip
        return TokenizeStage().run(ctx)


def content(folder: str) -> dict[str, bytes]:
    return {name: read_bytes(join(folder, "out", name)) for name, _ in list_files(join(folder, "out"))}


@pytest.mark.usefixtures("ray_session")
def test_artifact_is_complete_and_the_same_for_any_workers_and_files(tmp_path: Path) -> None:
    code = make_corpus(tmp_path / "code", rows=100)
    first = run({"web": make_corpus(tmp_path / "a", rows=200), "code": code}, str(tmp_path / "one"))
    many = {"resources": Resources(workers=2)}
    second = run({"code": code, "web": make_corpus(tmp_path / "b", 200, 7)}, str(tmp_path / "two"), **many)
    assert first == second
    assert content(str(tmp_path / "one")) == content(str(tmp_path / "two"))
    facts = json.loads((tmp_path / "one" / "out" / "tokens.json").read_text())
    train, held = (TokenDataset.open(tmp_path / "one" / "out" / side) for side in ("train", "heldout"))
    assert (facts["train_sequences"], facts["train_tokens"]) == (len(train), train.tokens)
    assert (facts["heldout_sequences"], facts["heldout_tokens"]) == (len(held), held.tokens)
    assert (facts["heldout_bytes"], facts["heldout_documents"]) == (held.text_bytes, held.documents)
    assert held.documents + train.documents == 300
    for data, side in ((train, "train"), (held, "heldout")):
        assert [source.name for source in data.sources] == ["code", "web"]
        assert facts["sources"][side]["web"]["sequences"] == len(data.source_range("web"))
        assert data.source_of(data.source_range("web")).tolist() == [1] * len(data.source_range("web"))
    assert [sum(sides[n].documents for sides in (train.sources, held.sources)) for n in (0, 1)] == [100, 200]
    assert facts["dtype"] == "uint16" and 261 < facts["vocab_size"] == train.vocab_size <= 400
    assert 0 < facts["unigram_entropy"] < np.log(facts["vocab_size"])
    assert first.counts["train_tokens"] == train.tokens
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "one" / "out" / "tokenizer"), local_files_only=True)
    ids = held.batch([0])["input_ids"][0].tolist()
    assert set(tokenizer.decode(ids).replace("<|endoftext|>", " ").split()[1:-1]) <= set(WORDS)


@pytest.mark.usefixtures("ray_session")
def test_an_interrupted_try_is_continued_and_leftovers_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = make_corpus(tmp_path / "a")
    run(corpus, str(tmp_path / "whole"))

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("modelyard.stages.tokenize._pack", crash)
        with pytest.raises(KeyboardInterrupt):
            run(corpus, str(tmp_path / "cut"))
    encoded = sorted((tmp_path / "cut" / "work" / "encoded").iterdir())
    times = [p.stat().st_mtime_ns for p in encoded]
    assert len(encoded) == 3 and not exists(str(tmp_path / "cut" / "out" / "tokens.json"))
    (tmp_path / "cut" / "out" / "train").mkdir(parents=True)
    (tmp_path / "cut" / "out" / "train" / "shard-09999.bin").write_bytes(b"leftover")
    run(corpus, str(tmp_path / "cut"))
    assert [p.stat().st_mtime_ns for p in encoded] == times
    assert content(str(tmp_path / "cut")) == content(str(tmp_path / "whole"))


@pytest.mark.usefixtures("ray_session")
def test_a_given_tokenizer_is_used(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a")
    run(corpus, str(tmp_path / "one"))
    tokenizer = str(tmp_path / "one" / "out" / "tokenizer")
    run(corpus, str(tmp_path / "two"), tokenizer={"path": tokenizer})
    assert content(str(tmp_path / "one")) == content(str(tmp_path / "two"))


@pytest.mark.usefixtures("ray_session")
def test_too_little_text_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="leaves no document") as caught:
        run(make_corpus(tmp_path / "a", rows=3), str(tmp_path / "one"), heldout=0.01)
    assert "heldout side" in str(caught.value) and type(caught.value) is DataError
    with pytest.raises(DataError, match="fill no sequence"):
        run(make_corpus(tmp_path / "b", rows=30), str(tmp_path / "two"), sequence_length=100_000)
    with pytest.raises(DataError, match="no text to train"):
        run(make_corpus(tmp_path / "c", text=""), str(tmp_path / "three"))


@pytest.mark.usefixtures("ray_session")
def test_a_damaged_corpus_is_named(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "a")
    path = tmp_path / "a" / "data" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[4:400] = b"\xff" * 396
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="cannot be read") as caught:
        run(corpus, str(tmp_path / "one"))
    assert "part-00001" in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"heldout": 0.0}, {"heldout": 1.0}, {"sequence_length": 1}, {"tokenizer": {}}, {"tokenizer": {"trian": {}}}],
)
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TokenizeOptions(kind="tokenize", **options)


def test_option_models_are_light() -> None:
    import subprocess
    import sys

    code = (
        "import sys, modelyard.stages.tokenize;"
        "print([m for m in ('torch', 'ray', 'mlflow', 'transformers', 'numba', 'tokenizers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
