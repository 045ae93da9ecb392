"""Batch inference: exactly one row out for each row in, the same whatever workers, units and interruptions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "engine")]

from tiny import save_model  # noqa: E402 - found by the path above
from training_stage import plan as plan_context  # noqa: E402 - found by the path above
from training_stage import run_stage  # noqa: E402 - found by the path above

from modelyard.errors import DataError, RecipeError  # noqa: E402
from modelyard.stages.generate import GenerateOptions, GenerateStage  # noqa: E402
from modelyard.stages.generate_units import plan, read_rows  # noqa: E402
from modelyard.stages.generate_worker import Writer  # noqa: E402
from modelyard.storage import Files, find_files  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """21 rows: JSONL with what people's files hold, and Parquet in three row groups."""
    lines: list[Any] = [{"prompt": f"The scheduler {i}", "id": i, "extra": {"a": [i]}} for i in range(9)]
    lines += [{"messages": [{"role": "user", "content": "hello"}]}, {"prompt": "世界 \ud800"}, {"text": "no prompt"}]
    folder = tmp_path / "rows"
    folder.mkdir()
    text = "\n".join(json.dumps(line) for line in lines[:6]) + "\n\n  \n{broken\n"
    text += "\n".join(json.dumps(line) for line in lines[6:])  # no line feed at the end
    (folder / "a.jsonl").write_text(text)
    table = pa.table({"prompt": [f"A request {i}" for i in range(8)], "score": list(range(8))})
    pq.write_table(table, folder / "b.parquet", row_group_size=3)
    return folder


def files(folder: Path) -> Files:
    return find_files((f"{folder}/*",), ())


def options(**changes: Any) -> GenerateOptions:
    settings: dict[str, Any] = {
        "sampling": {"max_tokens": 6, "temperature": 0.8, "seed": 3}, "engine": {"max_sequences": 4, "threads": 1},
        "rows_a_unit": 4, "max_errors": 0.2,
    }  # fmt: skip
    return GenerateOptions.model_validate(settings | changes)


def output(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in sorted((folder / "out" / "data").iterdir()):
        if path.suffix == ".parquet":
            found += pq.read_table(path).to_pylist()
        else:
            found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def test_one_row_out_for_each_row_in(ray_session: None, model: Path, rows: Path, tmp_path: Path) -> None:
    inputs = {"model": files(model), "rows": files(rows)}
    result = run_stage(options(resources={"workers": 2}), inputs, tmp_path / "one")
    found = output(tmp_path / "one")
    assert len(found) == 21 == result.counts["rows"]
    assert [row.get("id") for row in found[:6]] == list(range(6)) and found[0]["extra"] == {"a": [0]}
    assert [row["score"] for row in found[13:]] == list(range(8))
    errors = [row["generated_error"] for row in found if row["generated_error"]]
    assert len(errors) == result.counts["errors"] == 3
    assert "not JSON" in errors[0] and "Unicode" in errors[1] and "no prompt" in errors[2]
    answered = [row for row in found if not row["generated_error"]]
    assert all(row["generated_finish"] in ("stop", "length") and 1 <= row["generated_tokens"] <= 6 for row in answered)

    # A killed run: two finished units are kept, the rest is done again, by one worker.
    done, data = tmp_path / "one" / "work" / "done", tmp_path / "one" / "out" / "data"
    kept = {path.name: path.stat().st_mtime_ns for path in data.iterdir()}
    for record in sorted(done.iterdir())[2:]:
        record.unlink()
    (data / sorted(kept)[-1]).unlink()
    run_stage(options(), inputs, tmp_path / "one")
    assert output(tmp_path / "one") == found
    untouched = [name for name, when in kept.items() if (data / name).stat().st_mtime_ns == when]
    assert sorted(untouched) == sorted(kept)[:2]


def test_answers_do_not_depend_on_units_or_neighbours(model: Path, rows: Path, tmp_path: Path) -> None:
    how = options().model_dump(include={"prompt", "messages", "system", "chat", "output", "sampling"})
    uris = [ref.uri for ref in files(rows).refs]
    answers = []
    for size, slots in ((3, 1), (100, 8)):
        folder = tmp_path / str(size)
        writer = Writer(str(model), {"max_sequences": slots, "threads": 1}, how, f"{folder}/out/data", f"{folder}/done")
        units = plan(uris, size, "generated")
        assert sum(unit.rows for unit in units) == 21 and [u.index for u in units] == list(range(len(units)))
        assert all(len(read_rows(unit)) == unit.rows for unit in units)
        for unit in units:
            writer.work(unit)
        writer._engine.close()
        answers.append([row["generated"] for row in output(folder)])
    assert answers[0] == answers[1] and len({a for a in answers[0] if a}) > 5


def test_mistakes_are_seen_before_the_engine(model: Path, rows: Path, tmp_path: Path) -> None:
    def check(stage_options: GenerateOptions, folder: Path) -> None:
        GenerateStage().check(plan_context(stage_options, {"model": files(model), "rows": files(folder)}))

    with pytest.raises(RecipeError, match="same field"):
        check(options(messages="prompt"), rows)
    (tmp_path / "taken").mkdir()
    pq.write_table(pa.table({"prompt": ["a"], "score_error": ["b"]}), tmp_path / "taken" / "c.parquet")
    with pytest.raises(DataError, match="column score_error"):
        check(options(output="score"), tmp_path / "taken")
    (rows / "c.csv").write_text("prompt\nhello\n")
    with pytest.raises(DataError, match="neither JSONL nor Parquet"):
        check(options(), rows)
    (rows / "c.csv").unlink()
    (rows / "d.parquet").write_bytes(b"PAR1 but cut")
    with pytest.raises(DataError, match="Parquet"):
        check(options(), rows)


def test_too_many_errors_fail_and_name_the_first(ray_session: None, model: Path, rows: Path, tmp_path: Path) -> None:
    (rows / "b.parquet").unlink()
    with pytest.raises(DataError, match="3 of 13") as error:
        run_stage(options(max_errors=0.1), {"model": files(model), "rows": files(rows)}, tmp_path / "bad")
    assert "not JSON" in error.value.what
    for path in rows.iterdir():
        path.write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        run_stage(options(), {"model": files(model), "rows": files(rows)}, tmp_path / "none")
