"""A node that dies while a recipe runs costs time and changes nothing in what comes out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("two_nodes.py")

RECIPE = """
name: two-nodes
stages:
  corpus:
    kind: curate
    inputs: {{files: {{paths: ["{packages}/**/*.py", "{packages}/**/*.txt"], max_bytes: 12MB}}}}
    steps:
      - normalize: {{}}
      - dedup: {{method: exact}}
      - dedup: {{method: minhash, jaccard: 0.8}}
    resources: {{workers: 2}}
  tokens:
    kind: tokenize
    inputs: {{corpus: corpus}}
    tokenizer: {{train: {{vocab_size: 1024, sample_bytes: 1MB}}}}
    sequence_length: 128
    resources: {{workers: 2}}
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("no_ray")
def test_a_recipe_survives_the_sudden_loss_of_a_node(tmp_path: Path, documentation: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(packages=documentation))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["removed"]
    assert result["tasks"], "the node was idle when it was taken away"
    assert result["scratch"], "the node was taken away before any work"
    assert not result["published"], "the node was taken away after the work"
    assert {name: len(files) > 0 for name, files in result["broken"].items()} == {"corpus": True, "tokens": True}
    assert result["broken"] == result["whole"]
