"""The root on a real S3 server: curate and tokenize read and write there, and resume there."""

from __future__ import annotations

import gzip
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
    inputs: {{files: "{root}/raw/**/*"}}
    steps: [{{normalize: {{}}}}, {{dedup: {{method: exact}}}}, {{dedup: {{method: minhash}}}}, {{scrub: {{}}}}]
  tokens:
    kind: tokenize
    inputs: {{corpus: corpus}}
    tokenizer: {{train: {{vocab_size: 400}}}}
    sequence_length: 64
    heldout: 0.2
"""


def warc(text: str) -> bytes:
    """A page in an archive, and another record that is cut short."""
    block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<main><p>{text}</p></main>".encode()
    head = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://site/\r\nContent-Length: {len(block)}\r\n"
    packed = gzip.compress(f"{head}Content-Type: application/http\r\n\r\n".encode() + block + b"\r\n\r\n")
    return packed + packed[:80]


@pytest.mark.slow
def test_curate_and_tokenize_on_s3(moto_server: str, ray_session: None, documentation: Path, tmp_path: Path) -> None:
    root = f"s3://yard/{uuid.uuid4().hex}"
    raw = tmp_path / "raw"
    raw.mkdir()
    sources = sorted(documentation.glob("*/**/*.rst"), key=lambda p: p.stat().st_size)[-12:]
    assert len(sources) >= 5, "the test needs some .rst files among the installed packages"
    for i, path in enumerate(sources):
        (raw / f"{i:02d}.rst").write_bytes(path.read_bytes())
    (raw / "copy.rst").write_bytes(sources[0].read_bytes())
    (raw / "in.warc.gz").write_bytes(
        warc("A page of an archive that lies in a bucket, and its text goes on a little. " * 4)
    )
    upload(raw, f"{root}/raw")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(root=root))

    outcome = run(load(recipe))
    names = [name for name, _ in list_files(outcome.artifacts["corpus"].uri)]
    assert any(name.startswith("data/") for name in names)
    assert any(name.startswith("audit/") for name in names)
    counts = outcome.artifacts["corpus"].manifest.counts
    assert counts["documents"] < counts["documents_in"] == len(sources) + 3
    steps = json.loads(read_bytes(outcome.artifacts["corpus"].join("funnel.json")))["steps"]
    assert steps[0]["reasons"] == {"truncated": 1}
    facts = json.loads(read_bytes(outcome.artifacts["tokens"].join("tokens.json")))
    assert facts["train_tokens"] > 0
    assert facts["heldout_tokens"] > 0
    assert all(step.cached for step in plan(load(recipe)))
    for artifact in outcome.artifacts.values():
        artifact.verify()
