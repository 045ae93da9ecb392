"""Stage `curate` killed in the middle: the rerun takes up finished units and makes the same bytes."""

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

from modelyard.recipe import Resources
from modelyard.stages.base import StageContext
from modelyard.stages.curate import CurateOptions, CurateStage
from modelyard.stages.progress import Display, Progress
from modelyard.storage import FileRef, Files

STEPS = [{"normalize": {}}, {"dedup": {"method": "exact"}}, {"dedup": {"method": "minhash"}}, {"scrub": {}}]


class _NoTracking:
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Nobody looks."""

    def log_text(self, name: str, text: str) -> None:
        """Nobody reads."""


def curate(data: Path, folder: str) -> dict[str, int]:
    refs = [FileRef(str(p), p.stat().st_size, p.name) for p in sorted(data.iterdir())]
    options = CurateOptions(kind="curate", steps=STEPS, resources=Resources(workers=2))  # type: ignore[arg-type]
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


def records(folder: Path) -> int:
    return len(list((folder / "work").glob("segment-*/done/*.json")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 MB in one JSONL file and one text file: six units; a tenth of the documents are near-copies."""
    rng = random.Random(3)
    words = [f"w{rng.randint(0, 10**6)}" for _ in range(3000)]
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(rng.choices(words, k=400)) for _ in range(5600)]
    texts[::10] = [t + " end" for t in texts[1::10]]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (folder / "b.txt").write_text("\n".join(texts[:1800]))
    return folder


@pytest.mark.slow
def test_killed_at_any_moment_the_rerun_makes_the_same_bytes(ray_session: None, data: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    counts = curate(data, str(whole))
    assert counts["documents"] < counts["documents_in"] == 5601
    total = records(whole)
    for moment in (2, total - 2):
        folder = tmp_path / f"killed-{moment}"
        process = subprocess.Popen([sys.executable, __file__, str(data), str(folder)], env=os.environ)
        while records(folder) < moment and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        before = records(folder)
        assert moment <= before < total, "the run must be killed in its middle"
        _damage(folder)
        assert curate(data, str(folder)) == counts
        assert digests(folder) == digests(whole)


def _damage(folder: Path) -> None:
    """Cuts off the end of a finished intermediate: its unit has to be done again."""
    parts = sorted(folder.glob("work/segment-0-*/documents/part-*.parquet"))
    parts[0].write_bytes(parts[0].read_bytes()[:-50])


if __name__ == "__main__":
    from modelyard.stages import session

    session.start(2)
    curate(Path(sys.argv[1]), sys.argv[2])
    session.stop()
