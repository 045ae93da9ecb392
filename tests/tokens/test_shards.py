"""Token shards: what is written is read, and damage is one DataError that names the file."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelyard.errors import DataError
from modelyard.storage import upload, write_bytes
from modelyard.tokens import Sequences, TokenDataset, TokenWriter, open_in_place
from modelyard.tokens.ranges import RangedTokens


def _sequences(n: int, length: int, vocab: int, seed: int = 0) -> Sequences:
    rng = np.random.default_rng(seed)
    lengths = np.full(n, length)
    lengths[-1] = rng.integers(1, length + 1)
    starts = rng.random((n, length)) < 0.1
    tokens = rng.integers(0, vocab, (n, length))
    outside = np.arange(length) >= lengths[:, None]
    starts[outside], tokens[outside] = False, 0
    return Sequences(tokens, starts, lengths)


def _write(folder: Path, n: int = 10, length: int = 16, vocab: int = 300, shard_bytes: int = 200) -> Sequences:
    sequences = _sequences(n, length, vocab)
    writer = TokenWriter(folder, length, vocab, shard_bytes=shard_bytes)
    writer.add(sequences)
    writer.close(documents=3, text_bytes=99)
    return sequences


def _slow_document_ids(sequences: Sequences) -> list[list[int]]:
    rows = []
    for starts, length in zip(sequences.starts, sequences.lengths, strict=True):
        document, row = 0, []
        for i, start in enumerate(starts):
            document += int(start and i > 0)
            row.append(document if i < length else -1)
        rows.append(row)
    return rows


@given(
    n=st.integers(1, 40),
    length=st.integers(1, 40),
    vocab=st.sampled_from([2, 300, 65_536, 65_537, 200_000]),
    shard_bytes=st.integers(1, 4000),
)
@settings(deadline=None, max_examples=40)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, n: int, length: int, vocab: int, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("tokens")
    sequences = _write(folder, n, length, vocab, shard_bytes)
    ds = TokenDataset.open(folder)
    assert (len(ds), ds.sequence_length, ds.vocab_size) == (n, length, vocab)
    assert ds.tokens == sequences.lengths.sum()
    order = np.random.default_rng(n).integers(0, n, 2 * n)
    batch = ds.batch(order)
    assert batch["input_ids"].dtype == np.int64
    assert np.array_equal(batch["input_ids"], sequences.tokens[order])
    assert batch["document_ids"].dtype == np.int32
    assert np.array_equal(batch["document_ids"], np.array(_slow_document_ids(sequences))[order])


def test_counts_and_pickling(tmp_path: Path) -> None:
    _write(tmp_path)
    ds = pickle.loads(pickle.dumps(TokenDataset.open(tmp_path)))
    assert (ds.documents, ds.text_bytes) == (3, 99)
    assert ds.batch(np.array([], dtype=np.int64))["input_ids"].shape == (0, 16)
    with pytest.raises(IndexError, match=r"0\.\.9"):
        ds.batch([10])


def test_sources_are_ranges_of_sequences(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path, 16, 300, shard_bytes=200)
    for n, source in ((7, "web"), (9, "code"), (4, "web")):
        writer.add(_sequences(n, 16, 300, seed=n), source, documents=n, text_bytes=10 * n)
    writer.close()
    ds = TokenDataset.open(tmp_path)
    assert [(s.name, s.sequences, s.documents, s.text_bytes) for s in ds.sources] == [
        ("web", 11, 11, 110), ("code", 9, 9, 90)
    ]  # fmt: skip
    assert (ds.source_range("web"), ds.source_range("code")) == (range(11), range(11, 20))
    assert ds.source_of([[0, 10], [11, 19]]).tolist() == [[0, 0], [1, 1]]
    expected = [_sequences(n, 16, 300, seed=n).tokens for n in (7, 4, 9)]
    assert np.array_equal(ds.batch(np.arange(20))["input_ids"], np.concatenate(expected))
    with pytest.raises(KeyError, match="web, code"):
        ds.source_range("books")


def test_a_folder_of_the_first_version_is_one_source(tmp_path: Path) -> None:
    _write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    del index["sources"]
    for shard in index["shards"]:
        del shard["source"]
    (tmp_path / "index.json").write_text(json.dumps(index | {"version": 1}))
    (source,) = TokenDataset.open(tmp_path).sources
    assert (source.name, source.sequences, source.documents, source.text_bytes) == ("corpus", 10, 3, 99)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match="not listed"):
        TokenDataset.open(tmp_path)


def test_uint16_only_where_it_fits(tmp_path: Path) -> None:
    for vocab, dtype in ((65_536, "uint16"), (65_537, "uint32")):
        _write(tmp_path / dtype, vocab=vocab)
        assert json.loads((tmp_path / dtype / "index.json").read_text())["dtype"] == dtype


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "missing"),
        (lambda p: p.write_bytes(b""), "empty"),
        (_cut, "bytes where the index says"),
        (_flip, "checksum"),
    ],
)
def test_damaged_shard_is_named(tmp_path: Path, damage: object, words: str) -> None:
    _write(tmp_path)
    shard = tmp_path / "shard-00001.bin"
    damage(shard)  # type: ignore[operator]
    with pytest.raises(DataError, match=words) as caught:
        TokenDataset.open(tmp_path)
    assert str(shard) in str(caught.value)


def test_impossible_ids_are_seen_without_checksums(tmp_path: Path) -> None:
    _write(tmp_path)
    shard = tmp_path / "shard-00000.bin"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    ds = TokenDataset.open(tmp_path, verify=False)
    with pytest.raises(DataError, match="impossible") as caught:
        ds.batch([0])
    assert str(shard) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": "other"}'])
def test_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    _write(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match="index") as caught:
        TokenDataset.open(tmp_path)
    assert "index.json" in str(caught.value)


def test_no_index_and_no_sequences(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        TokenDataset.open(tmp_path / "absent")
    TokenWriter(tmp_path, 8, 10).close(documents=0, text_bytes=0)
    with pytest.raises(DataError, match="no sequences"):
        TokenDataset.open(tmp_path)


def test_a_remote_folder_is_read_where_it_lies(moto_server: str, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    writer = TokenWriter(tmp_path / "tokens", 16, 300, shard_bytes=20 * 40)
    starts = random.random((50, 16)) < 0.2
    writer.add(Sequences(random.integers(0, 300, (50, 16)), starts, np.full(50, 16)))
    writer.close(9, 100)
    upload(tmp_path / "tokens", "s3://yard/tokens")
    there, here = open_in_place("s3://yard/tokens"), open_in_place(str(tmp_path / "tokens"))
    assert len(there.index.shards) > 1
    assert isinstance(there, RangedTokens) and not isinstance(here, RangedTokens)
    wanted = [49, 0, 7, 7, 31]
    for name, expected in here.batch(wanted).items():
        assert np.array_equal(pickle.loads(pickle.dumps(there)).batch(wanted)[name], expected)
    write_bytes("s3://yard/tokens/shard-00001.bin", b"short")
    with pytest.raises(DataError, match="5 bytes where the index says"):
        open_in_place("s3://yard/tokens")
    with pytest.raises(DataError, match="cannot read a token shard"):
        there.batch(range(50))
