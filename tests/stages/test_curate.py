"""Stage `curate` on a real Ray: audit, identical output, shuffles, bad input, the report, and an S3 root."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

from modelyard.corpus.pseudonym import VARIABLE
from modelyard.errors import DataError, RecipeError, StageError
from modelyard.stages.base import PlanContext, StageContext, StageResult
from modelyard.stages.curate import CurateOptions, CurateStage
from modelyard.stages.progress import Display, Progress
from modelyard.storage import FileRef, Files, join, list_files, read_bytes, write_bytes

NOUNS = ["river", "stone", "cloud", "garden", "letter", "window", "bridge", "market", "forest", "engine", "signal"]
VERBS = ["holds", "moves", "finds", "keeps", "turns", "carries", "lights", "follows", "answers", "crosses"]
STEPS = [
    {"normalize": {}},
    {"quality": {"rules": ["gopher"], "gopher": {"min_words": 20, "max_top_2gram": None, "max_top_3gram": None}}},
    {"dedup": {"method": "exact"}},
    {"dedup": {"method": "minhash", "jaccard": 0.7}},
    {"scrub": {}},
]


def sentence(rng: random.Random) -> str:
    one, two, three = (rng.choice(NOUNS) for _ in range(3))
    return f"The {one} {rng.choice(VERBS)} the {two} of {three} {rng.randint(1, 999)}."


def corpus(folder: str, documents: int = 240, seed: int = 7) -> Files:
    """JSONL files with planted exact and near duplicates, e-mails, short texts and broken lines."""
    rng = random.Random(seed)
    texts = [" ".join(sentence(rng) for _ in range(rng.randint(8, 30))) for _ in range(documents)]
    texts += texts[:20]
    texts += [t.rsplit(" ", 3)[0] + " And that is all." for t in texts[30:60]]
    texts += [
        " ".join(sentence(rng) for _ in range(8)) + f" Write to person{n}@mail-host.net about it." for n in range(15)
    ]
    texts += ["short"] * 10
    rng.shuffle(texts)
    rows = [json.dumps({"text": t, "n": n}) for n, t in enumerate(texts)] + ["{broken", '{"no": 1}', '{"text": 3}']
    refs = []
    for number in range(4):
        data = "\n".join(rows[number::4]).encode()
        uri = join(folder, f"in-{number}.jsonl")
        write_bytes(uri, data)
        refs.append(FileRef(uri, len(data), hashlib.md5(data).hexdigest()))
    return Files(tuple(refs), "digest")


class Recorder:
    """Stands where the tracking run is handed in, and remembers metrics."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.texts: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics |= metrics

    def log_text(self, name: str, text: str) -> None:
        self.texts[name] = text


def run(files: Files, folder: str, **options: Any) -> tuple[StageResult, Recorder]:
    settings = {"kind": "curate", "steps": STEPS, "resources": {"workers": 2}} | options
    recorder = Recorder()
    with Display() as display:
        ctx: Any = StageContext(
            name="corpus", recipe="r", options=CurateOptions.model_validate(settings), fingerprint="1" * 64,
            root=folder, inputs={"files": files}, output=join(folder, "out"), work=join(folder, "work"),
            run=recorder, progress=Progress(display, "corpus"),  # type: ignore[arg-type]
        )  # fmt: skip
        return CurateStage().run(ctx), recorder


def table(folder: str, name: str) -> Any:
    return pads.dataset(join(folder, "out", name), format="parquet").to_table()


def digests(folder: str) -> dict[str, str]:
    names = [n for n, _ in list_files(join(folder, "out")) if not n.endswith(".html")]
    return {n: hashlib.sha256(read_bytes(join(folder, "out", n))).hexdigest() for n in names}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return corpus(str(tmp_path_factory.mktemp("inputs")))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("curated"))


@pytest.fixture
def result(ray_session: None, inputs: Files, done: str) -> StageResult:
    """One run of the whole chain; later tests resume it, which is quick."""
    return run(inputs, done)[0]


def test_nothing_disappears_without_a_row(result: StageResult, done: str) -> None:
    kept, audit = table(done, "data"), table(done, "audit")
    assert result.counts["documents_in"] == kept.num_rows + audit.num_rows == 318
    assert result.counts["documents"] == kept.num_rows
    reasons = Counter(audit["reason"].to_pylist())
    assert reasons["invalid_json"] == 1 and reasons["missing_text"] == 1 and reasons["text_not_string"] == 1
    assert reasons["exact_duplicate"] >= 20 and reasons["near_duplicate"] >= 25
    assert reasons["gopher_short_doc"] >= 10
    ids = kept["id"].to_pylist() + audit["id"].to_pylist()
    assert len(set(ids)) == len(ids) == 318


def test_duplicates_name_the_twin_that_stays_and_the_similarity(result: StageResult, done: str) -> None:
    kept = set(table(done, "data")["id"].to_pylist())
    audit = table(done, "audit").to_pylist()
    near = [row for row in audit if row["reason"] == "near_duplicate"]
    assert near and all(row["twin"] in kept and 0.7 <= row["jaccard"] <= 1 for row in near)
    exact = [row for row in audit if row["reason"] == "exact_duplicate"]
    later = {row["id"] for row in audit if row["step"] == "dedup"}
    assert all(row["twin"] in kept | later and row["jaccard"] == 1 for row in exact)


def test_columns_counts_and_funnel(result: StageResult, done: str) -> None:
    kept = table(done, "data")
    assert kept.column_names[:4] == ["id", "text", "source", "meta"]
    assert {kept.schema.field(name).type for name in ("id", "text", "source", "meta")} == {pa.string()}
    assert result.counts["bytes"] == sum(len(t.encode()) for t in kept["text"].to_pylist())
    funnel = json.loads(read_bytes(join(done, "out", "funnel.json")))["steps"]
    assert [s["name"] for s in funnel] == ["read", "normalize", "quality", "dedup_exact", "dedup", "scrub"]
    for before, after in itertools.pairwise(funnel):
        assert before["documents"] == after["documents_in"]
        assert after["documents_in"] == after["documents"] + sum(after["reasons"].values())
    assert not any("@mail-host" in t for t in kept["text"].to_pylist())
    assert funnel[-1]["counts"]["email/redact"] > 0


def test_excerpts_in_the_audit_are_scrubbed_too(ray_session: None, tmp_path: Path) -> None:
    rng = random.Random(1)
    texts = [*(f"mail person{n}@mail-host.net" for n in range(3)), " ".join(sentence(rng) for _ in range(20))]
    lines = [json.dumps({"text": text}) for text in texts]
    write_bytes(str(tmp_path / "a.jsonl"), "\n".join([*lines, '{"text": bad person9@mail-host.net}']).encode())
    files = Files((FileRef(str(tmp_path / "a.jsonl"), 999, "d"),), "d")
    run(files, str(tmp_path))
    for name in ("audit/part-00-00000.parquet", "report.html"):
        assert b"@mail-host" not in read_bytes(join(str(tmp_path), "out", name))
    assert all("@mail-host" not in (t or "") for t in table(str(tmp_path), "audit")["text"].to_pylist())


def test_the_same_bytes_come_out_again_with_other_workers_and_over_shuffles(
    result: StageResult, inputs: Files, done: str, tmp_path: Path
) -> None:
    run(inputs, str(tmp_path), shuffle_above=0, resources={"workers": 1})
    assert digests(str(tmp_path)) == digests(done)


def test_clusters_by_stars_and_paragraphs_are_the_same_over_shuffles(
    result: StageResult, inputs: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A paragraph here is a whole text: equal ones go by the first step, near ones by the second.
    steps = [
        {"dedup": {"method": "paragraphs", "min_length": 200}},
        {"dedup": {"method": "minhash", "jaccard": 0.7, "verify": "chain"}},
    ]
    one, _ = run(inputs, str(tmp_path / "one"), steps=steps)
    monkeypatch.setattr("modelyard.stages.curate_clusters.MAX_EDGES", 0)
    run(inputs, str(tmp_path / "many"), steps=steps, shuffle_above=0)
    assert digests(str(tmp_path / "one")) == digests(str(tmp_path / "many"))
    audit = table(str(tmp_path / "one"), "audit")
    reasons = Counter(audit["reason"].to_pylist())
    assert reasons["repeated_paragraphs"] == reasons["repeated_paragraph"] >= 20 and reasons["near_duplicate"] >= 25
    edits = [row for row in audit.to_pylist() if row["detail"] == "edit"]
    assert one.counts["documents_in"] == one.counts["documents"] + audit.num_rows - len(edits)
    assert list(tmp_path.glob("many/work/*/small-*.json"))


def test_a_finished_stage_is_taken_up_from_its_records(result: StageResult, inputs: Files, done: str) -> None:
    before = digests(done)
    data = Path(done, "out", "data", "part-00000.parquet")
    data.write_bytes(data.read_bytes()[:-100])
    write_bytes(join(done, "out", "data", "part-00099.parquet"), b"left by an interrupted try")
    again, _ = run(inputs, done)
    assert again.counts == result.counts and digests(done) == before


def test_report_and_card_show_the_numbers_and_escape_the_data(ray_session: None, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> {{TITLE}} " + " ".join(f"word{n}" for n in range(30))
    rows = [json.dumps({"text": t}) for t in (evil, evil + " tail", "other text")]
    write_bytes(str(tmp_path / "a.jsonl"), "\n".join(rows).encode())
    files = Files((FileRef(str(tmp_path / "a.jsonl"), 999, "d"),), "d")
    card = {"licence": "CC0-1.0", "source": "written for a test"}
    steps = [{"language": {"mode": "annotate"}}, {"dedup": {"method": "minhash"}}]
    _, recorder = run(files, str(tmp_path), steps=steps, card=card)
    page = read_bytes(join(str(tmp_path), "out", "report.html")).decode()
    assert "<script>" not in page and "&lt;script&gt;" in page and "{{" not in page
    assert "http" not in page.split("</style>")[0] and "near_duplicate" in page
    card = read_bytes(join(str(tmp_path), "out", "data_card.md")).decode()
    assert "2 documents" in card and "near_duplicate | 1" in card
    assert "CC0-1.0" in card and "written for a test" in card and "| language | documents |" in card
    assert "1 removed" in page and "language_score of kept documents" in page
    assert recorder.texts["report.html"] == page and recorder.texts["data_card.md"] == card
    assert recorder.metrics["dedup.2.kept_share"] == pytest.approx(2 / 3)


def test_docstring_pairs_have_prompts(ray_session: None, tmp_path: Path) -> None:
    source = 'def area(r):\n    """Returns the area of a circle of radius r."""\n'
    write_bytes(str(tmp_path / "a.py"), source.encode())
    write_bytes(str(tmp_path / "b.py"), b"def broken(:\n")
    files = Files((FileRef(str(tmp_path / "a.py"), 70, "a"), FileRef(str(tmp_path / "b.py"), 13, "b")), "d")
    run(files, str(tmp_path), read={"python": "docstrings"}, steps=[{"normalize": {}}, {"scrub": {}}])
    kept = table(str(tmp_path), "data").to_pylist()
    assert [(d["prompt"], d["text"]) for d in kept] == [("def area(r):", "Returns the area of a circle of radius r.")]
    assert table(str(tmp_path), "audit")["reason"].to_pylist() == ["bad_syntax"]


def test_nothing_left_names_the_step_that_dropped_most(ray_session: None, inputs: Files, tmp_path: Path) -> None:
    steps = [{"normalize": {}}, {"quality": {"rules": ["gopher"], "gopher": {"min_words": 10_000}}}]
    with pytest.raises(DataError, match=r"no documents are left of 318; the step 'quality' removed most"):
        run(inputs, str(tmp_path), steps=steps)


def test_too_many_bad_records_fail_with_a_summary(ray_session: None, inputs: Files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 records cannot be read, 2 are allowed") as raised:
        run(inputs, str(tmp_path), read={"max_bad_records": 2})
    assert "invalid_json 1" in str(raised.value) and ".jsonl" in raised.value.place


def test_what_a_later_step_brings_back_is_a_leak(
    ray_session: None, inputs: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from modelyard.stages import curate_ray

    run(inputs, str(tmp_path))
    part = str(tmp_path / "out" / "data" / "part-00000.parquet")
    rows = pq.read_table(part)
    text = pa.array(["Call person@mail-host.net", *rows["text"].to_pylist()[1:]])
    pq.write_table(rows.set_column(rows.column_names.index("text"), "text", text), part)
    options = CurateOptions.model_validate({"kind": "curate", "steps": STEPS})
    assert options.scrub is not None
    found = curate_ray.leaks([part], options.scrub, options.resources)
    assert found == [(rows["id"][0].as_py(), "email")]
    monkeypatch.setattr(curate_ray, "leaks", lambda *_: found)
    with pytest.raises(StageError, match="1 entities are left after the scrub: email"):
        run(inputs, str(tmp_path))


def plan(files: Files | None, **options: Any) -> None:
    settings = CurateOptions.model_validate({"kind": "curate", **options})
    ctx: Any = PlanContext("corpus", settings, "r", "root", {"files": files} if files else {}, {})
    CurateStage().check(ctx)
    assert CurateStage().estimate(ctx).memory_bytes


def test_mistakes_are_seen_before_any_work(inputs: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    plan(inputs, steps=STEPS)
    plan(None, steps=STEPS)
    with pytest.raises(RecipeError, match="pseudonymize needs a secret key"):
        plan(inputs, steps=[{"scrub": {"email": "pseudonymize"}}])
    with pytest.raises(DataError, match="holds no data"):
        plan(Files((FileRef("/x", 0, "d"),), "d"))


def test_an_earlier_artifact_is_read_with_its_ids(result: StageResult, done: str, tmp_path: Path) -> None:
    entries = [
        SimpleNamespace(path=name, bytes=size, checksum=name)
        for name, size in list_files(join(done, "out")) if name.startswith("data/")
    ]  # fmt: skip
    from datetime import UTC, datetime

    from modelyard.storage import Artifact, FileEntry, Manifest

    now = datetime.now(UTC)
    manifest = Manifest(
        stage="corpus", kind="curate", kind_version=1, fingerprint="0" * 64, recipe="r", options={}, inputs={},
        code_version="0", started=now, ended=now,
        files=[FileEntry(path=e.path, bytes=e.bytes, checksum=e.checksum) for e in entries],
    )  # fmt: skip
    run(Artifact(join(done, "out"), manifest), str(tmp_path), steps=[{"normalize": {}}])  # type: ignore[arg-type]
    before, after = table(done, "data"), table(str(tmp_path), "data")
    assert after["id"].to_pylist() == before["id"].to_pylist()
    assert after["text"].to_pylist() == before["text"].to_pylist()
    assert after["source"].to_pylist() == before["source"].to_pylist()


def test_whole_pages_that_are_no_documents_are_not_damage() -> None:
    from modelyard.corpus.tally import Tally
    from modelyard.stages.curate_run import _check_readable

    tally = Tally.start(["read"])
    tally.steps[0].reasons = {"http_status": 90, "content_type": 9, "no_content": 5, "truncated": 1}
    options = CurateOptions.model_validate({"kind": "curate", "read": {"max_bad_records": 1}})
    _check_readable(SimpleNamespace(options=options), tally)  # type: ignore[arg-type]
    tally.steps[0].reasons["corrupt"] = 1
    with pytest.raises(DataError, match=r"2 records cannot be read, 1 are allowed \(corrupt 1, truncated 1\)"):
        _check_readable(SimpleNamespace(options=options), tally)  # type: ignore[arg-type]
