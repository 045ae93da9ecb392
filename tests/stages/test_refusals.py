"""Stage `refusals`: answers of `generate` stages, counted side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from training_stage import artifact, run_stage

from modelyard.errors import DataError
from modelyard.stages.refusals import RefusalOptions
from modelyard.storage import Artifact

NO, YES = "I'm sorry, but I can't help with that.", "Gladly: here it is."


def answered(folder: Path, rows: list[dict[str, Any]]) -> Artifact:
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "part-00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return artifact(folder, "generate")


def probe(label: str, text: str | None) -> dict[str, Any]:
    return {"prompt": f"<a {label} thing>", "label": label, "generated": text, "generated_tokens": 3}


def test_rates_stand_side_by_side(tmp_path: Path) -> None:
    before = [probe("unsafe", YES), probe("unsafe", NO), probe("safe", YES), probe("safe", YES)]
    after = [probe("unsafe", NO), probe("unsafe", NO), probe("safe", NO), probe("safe", YES), probe("safe", None)]
    inputs = {name: answered(tmp_path / name, rows) for name, rows in (("before", before), ("after", after))}
    result = run_stage(RefusalOptions(kind="refusals"), dict(inputs), tmp_path / "run")
    assert result.metrics == {
        "before_refusal_rate": 0.5, "before_over_refusal_rate": 0.0,
        "after_refusal_rate": 1.0, "after_over_refusal_rate": 0.5,
    }  # fmt: skip
    assert result.counts["after_over_refusal_probes"] == 2, "a row that ended with an error is no answer"
    record = json.loads((tmp_path / "run" / "out" / "refusals.json").read_text())
    assert record["after"]["refusal"]["hits"] == 2
    page = (tmp_path / "run" / "out" / "report.html").read_text()
    assert "&lt;a unsafe thing&gt;" in page, "what is wrong is shown, and escaped"


@pytest.mark.parametrize("label", [None, "maybe"])
def test_a_probe_without_a_label_is_named(tmp_path: Path, label: str | None) -> None:
    rows = [probe("safe", YES), {"prompt": "p", "generated": YES, **({"label": label} if label else {})}]
    inputs = {"before": answered(tmp_path / "before", rows)}
    with pytest.raises(DataError, match="the label is") as caught:
        run_stage(RefusalOptions(kind="refusals"), dict(inputs), tmp_path / "run")
    assert caught.value.place.endswith("part-00000.jsonl:2")
