"""Stage `curate` killed again and again: each try takes up finished work, and the last makes the same bytes.

python tests/stages/test_curate_resume.py DATA FOLDER MODEL      # what the test kills
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from modelyard.stages.base import StageContext
from modelyard.stages.curate import CurateOptions, CurateStage
from modelyard.stages.progress import Display, Progress
from modelyard.storage import FileRef, Files, write_bytes

PARTITION = 200_000
"""Bytes of keys a partition, so that every shuffle has several."""


class _NoTracking:
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nobody looks."""

    def log_text(self, name: str, text: str) -> None:
        """Nobody reads."""


def curate(data: Path, folder: str, model: str, limit: int) -> dict[str, int]:
    refs = [FileRef(str(p), p.stat().st_size, p.name) for p in sorted(data.iterdir())]
    steps = [
        {"normalize": {}},
        {"dedup": {"method": "paragraphs", "min_length": 200}},
        {"dedup": {"method": "minhash", "verify": "chain"}},
        {"dedup": {"method": "semantic", "model": model, "cosine": 0.999, "max_tokens": 16}},
        {"scrub": {}},
    ]
    options = CurateOptions.model_validate(
        {"kind": "curate", "steps": steps, "resources": {"workers": 2}, "shuffle_above": limit}
    )
    with Display() as display:
        ctx: Any = StageContext(
            name="corpus", recipe="r", options=options, fingerprint="1" * 64, root=folder,
            inputs={"files": Files(tuple(refs), "d")}, output=f"{folder}/out", work=f"{folder}/work",
            run=_NoTracking(), progress=Progress(display, "corpus"),  # type: ignore[arg-type]
        )  # fmt: skip
        return dict(CurateStage().run(ctx).counts)


def digests(folder: Path) -> dict[str, str]:
    names = sorted(p for p in (folder / "out").rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 MB in one JSONL file and one text file: three units; near-copies, and openings and paragraphs that return."""
    rng = random.Random(3)
    opening, words = [f"w{n}" for n in range(100)], [f"x{rng.randint(0, 10**6)}" for _ in range(3000)]
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join([*rng.choices(opening, k=16), *rng.choices(words, k=400)]) for _ in range(2600)]
    texts[::10] = [t + " end" for t in texts[1::10]]
    texts[5::50] = [t + "\n\n" + texts[7][:400] for t in texts[5::50]]
    texts[8::50] = [" ".join([*texts[7].split()[:16], *t.split()[16:]]) for t in texts[8::50]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "b.txt").write_text("\n".join(texts[:300]))
    return folder


class Killed(BaseException):
    """Ends a run in this process as a kill would: nothing handles it."""


def kill(data: Path, folder: Path, model: str, moment: str) -> None:
    """Runs the stage in a process of its own and kills that when a file `moment` is below the work folder."""
    import ray

    address = ray.get_runtime_context().gcs_address
    words = [sys.executable, __file__, str(data), str(folder), model]
    process = subprocess.Popen(words, env=os.environ | {"RAY_ADDRESS": address})
    while not list(folder.glob(f"work/{moment}")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"the run must be killed in its middle, at {moment}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_any_moment_the_rerun_makes_the_same_bytes(
    ray_session: None, data: Path, embedding_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelyard.stages import curate_clusters, curate_run, curate_shuffle

    whole, folder = tmp_path / "whole", tmp_path / "killed"
    counts = curate(data, str(whole), embedding_model, limit=2**40)
    assert counts["documents"] < counts["documents_in"] == 2601

    def stop(moment: str) -> None:
        """A run in this process that ends when `moment` is to be written: the work is done, the record is not there."""

        def write(uri: str, content: bytes) -> None:
            if moment in uri:
                raise Killed
            write_bytes(uri, content)

        with monkeypatch.context() as patch:
            for module in (curate_shuffle, curate_run):
                patch.setattr(module, "write_bytes", write)
            patch.setattr(curate_clusters, "MAX_EDGES", 0)
            patch.setattr(curate_shuffle, "PARTITION_BYTES", PARTITION)
            with pytest.raises(Killed):
                curate(data, str(folder), embedding_model, limit=0)

    kill(data, folder, embedding_model, "segment-0-*/done/unit-00001.json")
    stop("/found.json")  # of repeated paragraphs
    kill(data, folder, embedding_model, "segment-1-*/large-0.json")
    # The end of an intermediate is missing: that part has to be done again, and what follows from it.
    (cut, *_) = folder.glob("work/segment-1-*/edges/part-*.parquet")
    cut.write_bytes(cut.read_bytes()[:-50])
    stop("/labels.json")
    (near,) = folder.glob("work/segment-1-*")
    stop(f"{near.name}/decisions/done.json")
    stop("segment-2-")  # the first record of the semantic deduplication: its centroids are there
    assert list(folder.glob("work/segment-2-*/centroids.npy"))
    assert curate(data, str(folder), embedding_model, limit=0) == counts
    result, expected = digests(folder), digests(whole)
    assert result.keys() == expected.keys()
    assert [name for name in expected if result[name] != expected[name]] in ([], ["out/report.html"])
    reasons = json.loads((whole / "out" / "funnel.json").read_bytes())["steps"]
    assert {r for step in reasons for r in step["reasons"]} >= {"near_duplicate", "semantic_duplicate"}


if __name__ == "__main__":
    from modelyard.stages import curate_clusters, curate_shuffle, session

    curate_clusters.MAX_EDGES, curate_shuffle.PARTITION_BYTES = 0, PARTITION
    session.start(2)
    curate(Path(sys.argv[1]), sys.argv[2], sys.argv[3], limit=0)
    session.stop()
