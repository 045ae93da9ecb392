"""Units and buckets: the same shards whatever the files, and an interrupted try is finished, not redone."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from modelyard.errors import DataError
from modelyard.tokens import TokenDataset
from modelyard.tokens.pack import Buckets
from modelyard.tokens.shards import describe_source, write_index
from modelyard.tokens.tokenizer import Encoder, save_tokenizer, train_tokenizer
from modelyard.tokens.units import Layout, encode_unit, pack_bucket, plan_units, read_bucket, sample_unit

LENGTH = 32


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(train_tokenizer(["some words to merge some words"] * 5, 300), folder)
    return Encoder.open(folder)


def _corpus(folder: Path, files: int, rows: int = 200, row_group: int = 40) -> str:
    folder.mkdir(parents=True)
    table = pa.table(
        {
            "id": [f"doc-{i}" for i in range(rows)],
            "text": [f"{i} some words to merge " * (1 + i % 7) for i in range(rows)],
            "source": ["s"] * rows,
        }
    )
    edges = np.linspace(0, rows, files + 1).astype(int)
    for n, (a, b) in enumerate(pairwise(edges)):
        pq.write_table(table.slice(a, b - a), folder / f"part-{n:05d}.parquet", row_group_size=row_group)
    return str(folder)


def _run(corpus: str, where: Path, encoder: Encoder) -> Layout:
    layout = Layout(str(where / "work"), str(where / "out"), {"web": Buckets(0.2, 3, 1)}, LENGTH)
    units = plan_units(corpus, 0, "web")
    for unit in reversed(units):
        encode_unit(unit, encoder, layout)
    for split in ("train", "heldout"):
        wanted = [b for b in range(4) if layout.buckets["web"].split(b) == split]
        packed = [pack_bucket(units, "web", b, encoder, layout) for b in wanted]
        shards = [p.shard for p in packed if p.shard]
        documents, size = sum(p.documents for p in packed), sum(p.text_bytes for p in packed)
        sources = [describe_source("web", 0, shards, documents, size)]
        write_index(str(where / "out" / split), LENGTH, encoder.vocab_size, shards, sources)
    return layout


def test_shards_do_not_depend_on_how_the_corpus_is_cut(tmp_path: Path, encoder: Encoder) -> None:
    contents = []
    for name, files, groups in (("one", 1, 500), ("many", 7, 11)):
        _run(_corpus(tmp_path / name / "data", files, row_group=groups), tmp_path / name, encoder)
        out = tmp_path / name / "out"
        contents.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert contents[0] == contents[1]
    assert len(contents[0]) == 6


def test_all_text_is_there_once(tmp_path: Path, encoder: Encoder) -> None:
    corpus = _corpus(tmp_path / "data", 3)
    _run(corpus, tmp_path, encoder)
    held = TokenDataset.open(tmp_path / "out" / "heldout")
    train = TokenDataset.open(tmp_path / "out" / "train")
    assert held.documents + train.documents == 200
    batch = held.batch(np.arange(len(held)))
    ids = batch["input_ids"][batch["document_ids"] >= 0]
    text = encoder.tokenizer.decode(ids.tolist())
    assert len(text.encode()) == held.text_bytes
    assert ids.tolist().count(encoder.end_id) == held.documents
    assert len(ids) == held.tokens


def test_row_groups_of_a_large_file_are_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modelyard.tokens.units.MIN_UNIT_BYTES", 1)
    units = plan_units(_corpus(tmp_path / "data", 2), 0, "web")
    assert [(u.uri[-9:], u.first, u.last) for u in units][:4] == [
        ("0.parquet", 0, 1),
        ("0.parquet", 1, 2),
        ("0.parquet", 2, 3),
        ("1.parquet", 0, 1),
    ]
    assert sum(t.num_rows for u in units for t in u.tables()) == 200
    assert len({u.key for u in units}) == len(units)


def test_a_packed_bucket_is_not_packed_again(tmp_path: Path, encoder: Encoder) -> None:
    corpus = _corpus(tmp_path / "data", 2)
    layout = _run(corpus, tmp_path, encoder)
    units = plan_units(corpus, 0, "web")
    for unit in units:
        Path(layout.encoded(unit)).unlink()
    first = pack_bucket(units, "web", 1, encoder, layout)
    assert first.documents > 0 and first.counts.sum() == first.shard.tokens  # type: ignore[union-attr]
    # Without its shard the bucket must be packed again, which needs the encoded documents.
    (tmp_path / "out" / "train" / "shard-00001.bin").unlink()
    with pytest.raises(DataError, match="encoded documents cannot be read"):
        pack_bucket(units, "web", 1, encoder, layout)


def test_damaged_intermediate_is_named(tmp_path: Path, encoder: Encoder) -> None:
    corpus = _corpus(tmp_path / "data", 1)
    layout = _run(corpus, tmp_path, encoder)
    unit = plan_units(corpus, 0, "web")[0]
    Path(layout.encoded(unit)).write_bytes(b"short")
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_bucket([unit], 0, layout)
    assert unit.key in str(caught.value)


def test_sample_leaves_held_out_documents_out(tmp_path: Path, encoder: Encoder) -> None:
    corpus = _corpus(tmp_path / "data", 1)
    layout = _run(corpus, tmp_path, encoder)
    unit = plan_units(corpus, 0, "web")[0]
    held = set(read_bucket([unit], 3, layout)["id"].to_pylist())
    sample = set(sample_unit(unit, 1.0, 0.2)["id"].to_pylist())
    assert held and not held & sample and len(held | sample) == 200
    assert 0 < sample_unit(unit, 0.3, 0.2).num_rows < len(sample)


def test_bad_corpora_are_named(tmp_path: Path, encoder: Encoder) -> None:
    with pytest.raises(DataError, match="no Parquet files"):
        plan_units(str(tmp_path / "absent"), 0, "web")
    corpus = _corpus(tmp_path / "data", 1)
    unit = plan_units(corpus, 0, "web")[0]
    (tmp_path / "data" / "part-00000.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="cannot be read"):
        plan_units(corpus, 0, "web")
    pq.write_table(pa.table({"id": ["a"], "body": ["x"]}), tmp_path / "data" / "part-00000.parquet")
    with pytest.raises(DataError, match="no column text"):
        plan_units(corpus, 0, "web")
    pq.write_table(pa.table({"id": pa.array([], "string"), "text": pa.array([], "string")}), unit.uri)
    with pytest.raises(DataError, match="no documents"):
        plan_units(corpus, 0, "web")
