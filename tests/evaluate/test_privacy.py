"""Memorization: a model that learnt a value by heart is caught, and no value leaves memory."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from evaluate_parts import make_model, memorize, save

from modelyard.errors import DataError
from modelyard.evaluate.measure import Job, Measured, measure
from modelyard.evaluate.options import EvaluationOptions, PrivacyOptions
from modelyard.evaluate.privacy import Finding, Probe, emission, extraction, fair, redact
from modelyard.evaluate.report import page, plain
from modelyard.train.pairs import Pair

VALUE = "ada@lovelace.org"
CONTEXT = "every shard holds tokens of the corpus and a model reads them"
OPTIONS = EvaluationOptions(
    max_sequences=4, samples=1, sample_tokens=8, privacy=PrivacyOptions(free_samples=3, free_tokens=8, new_tokens=24)
)


def scan(texts: Sequence[str]) -> list[list[Finding]]:
    return [[("email", found) for found in re.findall(r"[\w.]+@[\w.]+\w", text)] for text in texts]


def _probe(value: str = VALUE, context: str = CONTEXT) -> Probe:
    return Probe("email", value, context, "file.md")


@pytest.fixture(scope="module")
def leaky(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows by heart what stood behind the context."""
    folder = tmp_path_factory.mktemp("leaky")
    model = make_model(tokens, folder)
    memorize(model, [f"{CONTEXT} {VALUE} of the model"], tokens)
    save(model, tokens, folder)
    return folder


def test_memorized_value_is_caught_and_a_fresh_model_has_none(tokens: Path, leaky: Path, model_folder: Path) -> None:
    probes = (_probe(), _probe("bob@byron.org", "and the corpus"))
    job = Job(leaky, tokens, OPTIONS, probes=probes, known=frozenset({("email", VALUE)}))
    told: list[int] = []
    caught = measure(job, scan, told.append)
    assert caught.extraction.tried == {"email": 2}
    assert caught.extraction.reproduced == {"email": 1}
    assert caught.extraction.documents == ("file.md",)
    assert sum(told) == job.units
    clean = measure(replace(job, model=model_folder), scan)
    assert clean.extraction.reproduced == {}
    _nothing_shown(caught, clean)


def _nothing_shown(*results: Measured) -> None:
    names = {f"m{i}": r for i, r in enumerate(results)}
    shown = page("title", names, 5.0, ["a note"]) + json.dumps([plain(n, r) for n, r in names.items()])
    assert "reproduced" in shown and VALUE not in shown and "bob@" not in shown


def test_the_same_job_gives_the_same_result(tokens: Path, model_folder: Path) -> None:
    pairs = (Pair(({"role": "user", "content": "shard"},), "holds tokens of the corpus", "p"),)
    job = Job(model_folder, tokens, OPTIONS, pairs=pairs, pair_length=32, probes=(_probe(),))
    first, second = (replace(measure(job, scan), seconds=0.0) for _ in range(2))
    assert first == second
    assert first.completion is not None and first.completion > 0
    assert [sample.kind for sample in first.samples] == ["continuation", "answer"]
    assert first.bits_per_byte > 0 and first.parameters > 1000


def test_another_tokenizer_or_shorter_model_is_refused(tokens: Path, tmp_path: Path) -> None:
    make_model(tokens, tmp_path / "short", max_position_embeddings=16)
    with pytest.raises(DataError, match="longer than the model's 16"):
        measure(Job(tmp_path / "short", tokens, OPTIONS), scan)
    make_model(tokens, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    config["model"]["vocab"] = {k + "x" if v == 300 else k: v for k, v in config["model"]["vocab"].items()}
    config["model"]["merges"] = []
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="another tokenizer"):
        measure(Job(tmp_path / "other", tokens, OPTIONS), scan)
    (tmp_path / "other" / "tokenizer.json").unlink()
    (tmp_path / "other" / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="tokenizer"):
        measure(Job(tmp_path / "other", tokens, OPTIONS), scan)


def test_unfair_probes_are_left_out() -> None:
    again = _probe(context=f"write to {VALUE.upper()} or")
    assert fair([again, _probe(), _probe(VALUE.title(), "other context")]) == [_probe()]


def test_extraction_ignores_letter_case() -> None:
    found = extraction([_probe(), _probe("b@c.de")], [f"x {VALUE.upper()}", "b@c.d"])
    assert (found.tried, found.reproduced) == ({"email": 2}, {"email": 1})


def test_emission_counts_forms_and_known_values() -> None:
    found = emission(["a@b.cd and e@f.gh", "none"], scan, {("email", "a@b.cd")})
    assert (found.samples, found.emitted, found.known) == (2, {"email": 2}, 1)


def test_values_are_never_shown() -> None:
    job = Job(Path(), Path(), OPTIONS, probes=(_probe(),), known=frozenset({("email", VALUE)}))
    assert VALUE not in repr(_probe()) and VALUE not in repr(job)
    assert redact(f"to {VALUE}, {VALUE}", scan) == "to [EMAIL], [EMAIL]"


def test_report_escapes_what_models_write(tokens: Path, model_folder: Path) -> None:
    result = measure(Job(model_folder, tokens, OPTIONS), scan)
    hostile = replace(result.samples[0], answer="<script>alert(1)</script>")
    html = page("<b>", {"<i>": replace(result, samples=(hostile,))}, 5.0, [])
    assert "<script" not in html and "<i>" not in html and "&lt;script&gt;" in html
    assert "not tested" in html and html.count("<svg") == 2
