"""Runs a training stage on hand-made inputs, in this process or as a script that a test can kill."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

from rich.console import Console

from modelyard.stages import registry, session
from modelyard.stages.base import PlanContext, StageContext, StageResult
from modelyard.stages.progress import Display, Progress
from modelyard.storage import Artifact, Files, Manifest
from modelyard.tracking.spool import SpoolRun


def artifact(uri: Path, kind: str, **counts: int) -> Artifact:
    """A folder as an artifact of some stage."""
    now = datetime.now(UTC)
    return Artifact(
        str(uri),
        Manifest(
            stage=uri.name,
            kind=kind,
            kind_version=1,
            fingerprint="a" * 64,
            recipe="test",
            options={},
            inputs={},
            code_version="0",
            started=now,
            ended=now,
            counts=counts,
        ),
    )


def plan(options: Any, inputs: dict[str, Artifact | Files], upstream: dict[str, Any] | None = None) -> PlanContext[Any]:
    """A plan context, and the stage's own `inputs` set as a recipe would."""
    named = options.model_copy(update={"inputs": {name: name for name in [*inputs, *(upstream or {})]}})
    return PlanContext("base", named, "test", "/nowhere", inputs, upstream or {})


def run_stage(options: Any, inputs: dict[str, Artifact | Files], folder: Path) -> StageResult:
    """Runs the stage that `options` belong to; output, work and spooled tracking lie in `folder`."""
    named = options.model_copy(update={"inputs": {name: name for name in inputs}})
    stage = registry.stage(options.kind)
    folder.mkdir(parents=True, exist_ok=True)
    with Display(Console(file=(folder / "screen.txt").open("a"))) as display:
        ctx: StageContext[Any] = StageContext(
            "base", "test", named, "f" * 64, str(folder), inputs, str(folder / "out"), str(folder / "work"),
            SpoolRun(folder / "spool"), Progress(display, "base"),
        )  # fmt: skip
        return stage.run(ctx)


def main() -> None:
    """`training_stage.py FOLDER TOKENS OPTIONS-JSON`: a pretrain stage in a Ray of its own."""
    folder, tokens, text = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    options = registry.option_models()["pretrain"].model_validate(json.loads(text))
    session.start(2)
    run_stage(options, {"tokens": artifact(tokens, "tokenize")}, folder)
    session.stop()


if __name__ == "__main__":
    main()
