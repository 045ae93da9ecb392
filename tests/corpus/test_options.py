"""Step options: single-key mappings, errors that help, nothing heavy at import."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import ValidationError

from modelyard.corpus.dedup_options import MinHashOptions
from modelyard.corpus.options import StepOptions
from modelyard.stages.curate import CurateOptions


def test_a_step_is_a_mapping_with_one_key() -> None:
    step = StepOptions.model_validate({"dedup": {"method": "minhash", "jaccard": 0.7}})
    assert step.name == "dedup" and isinstance(step.options, MinHashOptions) and step.options.jaccard == 0.7


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({}, "one key of"), ({"normalize": {}, "scrub": {}}, "one key of"), ({"qualty": {}}, "qualty"),
        ({"quality": {"rules": ["gofer"]}}, "gofer"), ({"quality": {"rules": ["c4", "c4"]}}, "named twice"),
        ({"quality": {"gopher": {"min_wrods": 3}}}, "min_wrods"), ({"dedup": {"method": "magic"}}, "magic"),
        ({"dedup": {}}, "method"), ({"scrub": {"email": "erase"}}, "redact"),
        ({"dedup": {"method": "exact", "x": 1}}, "x"),
    ],
)  # fmt: skip
def test_a_wrong_step_is_named(step: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError) as raised:
        StepOptions.model_validate(step)
    assert words in str(raised.value)


def test_keep_quality_needs_a_quality_step_before() -> None:
    best = {"dedup": {"method": "minhash", "keep": "quality"}}
    with pytest.raises(ValidationError, match="needs a quality step"):
        CurateOptions.model_validate({"kind": "curate", "steps": [best, {"quality": {}}]})
    CurateOptions.model_validate({"kind": "curate", "steps": [{"quality": {}}, best]})


def test_the_stage_module_imports_nothing_heavy() -> None:
    code = "import sys, modelyard.stages.curate; print([m for m in ('numba', 'ray', 'mlflow', 'ftfy', 'phonenumbers', 'pyarrow.compute') if m in sys.modules])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
