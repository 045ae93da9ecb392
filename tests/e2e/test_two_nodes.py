"""A node that dies in the middle of a shuffle costs time and changes nothing in what comes out."""

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
    inputs: {{files: {{paths: ["{packages}/**/*.py", "{packages}/**/*.txt"], max_bytes: 10MB}}}}
    steps:
      - dedup: {{method: minhash, jaccard: 0.8}}
    resources: {{workers: 2}}
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_ray")
def test_a_shuffle_survives_the_sudden_loss_of_a_node(tmp_path: Path, documentation: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(packages=documentation))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(recipe), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=880,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.strip().splitlines()[-1])
    assert result["removed"]
    assert result["tasks"], "the node was idle when it was taken away"
    assert any("/keys/" in name for name in result["scratch"]), "the node was taken away before the shuffle"
    assert not any("/decisions/" in name for name in result["scratch"]), "the node was taken away after the shuffle"
    assert not result["published"], "the node was taken away after the work"
    assert {name: len(files) > 0 for name, files in result["broken"].items()} == {"corpus": True}
    # The comparison went through one process: neither the lost node nor the shuffle shows.
    assert result["broken"] == result["whole"]
