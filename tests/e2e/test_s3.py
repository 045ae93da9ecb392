"""The root on a real S3 server: curate and tokenize read and write there, and resume there."""

from __future__ import annotations

import json
import uuid
from pathlib import Path

import pytest

from modelyard import load, plan, run
from modelyard.storage import list_files, read_bytes, upload

RECIPE = """
name: s3slice
root: {root}
stages:
  corpus:
    kind: curate
    inputs: {{files: "{root}/raw/**/*.rst"}}
    steps: [{{normalize: {{}}}}, {{dedup: {{method: exact}}}}, {{dedup: {{method: minhash}}}}, {{scrub: {{}}}}]
  tokens:
    kind: tokenize
    inputs: {{corpus: corpus}}
    tokenizer: {{train: {{vocab_size: 400}}}}
    sequence_length: 64
    heldout: 0.2
"""


@pytest.mark.slow
def test_curate_and_tokenize_on_s3(ray_session: None, moto_server: str, documentation: Path, tmp_path: Path) -> None:
    root = f"s3://yard/{uuid.uuid4().hex}"
    raw = tmp_path / "raw"
    raw.mkdir()
    sources = sorted(documentation.glob("*/**/*.rst"), key=lambda p: p.stat().st_size)[-12:]
    assert len(sources) >= 5, "the test needs some .rst files among the installed packages"
    for i, path in enumerate(sources):
        (raw / f"{i:02d}.rst").write_bytes(path.read_bytes())
    (raw / "copy.rst").write_bytes(sources[0].read_bytes())
    upload(raw, f"{root}/raw")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=root))

    outcome = run(load(recipe))
    names = [name for name, _ in list_files(outcome.artifacts["corpus"].uri)]
    assert any(name.startswith("data/") for name in names)
    assert any(name.startswith("audit/") for name in names)
    counts = outcome.artifacts["corpus"].manifest.counts
    assert counts["documents"] < counts["documents_in"]
    facts = json.loads(read_bytes(outcome.artifacts["tokens"].join("tokens.json")))
    assert facts["train_tokens"] > 0
    assert facts["heldout_tokens"] > 0
    assert all(step.cached for step in plan(load(recipe)))
    for artifact in outcome.artifacts.values():
        artifact.verify()
