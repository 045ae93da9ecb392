"""Work units: pieces of a corpus that workers encode, and buckets they pack, each resumable alone.

A unit is a range of row groups of one Parquet file, fixed by the artifact and so the same after a
crash, whatever blocks or workers a run had. Its result is one Arrow file whose record batch b holds
the documents of bucket b. Packing bucket b reads batch b of every unit of its source and writes one shard.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from modelyard.errors import DataError
from modelyard.storage import arrow_filesystem, exists, join, list_files, read_bytes, upload, write_bytes
from modelyard.tokens.pack import Buckets, by_bucket, encode_table, in_sample, pack_table
from modelyard.tokens.shards import Sequences, Shard, token_dtype, write_shard
from modelyard.tokens.statistics import Counts, token_counts
from modelyard.tokens.tokenizer import Encoder

MIN_UNIT_BYTES = 4 << 20
MAX_UNITS = 4096
"""Units are at least 4 MiB of Parquet columns, and at most about 4096: each is read once a bucket."""
_ROWS = 1024


@dataclass(frozen=True)
class Unit:
    """Row groups `first` to `last` - 1 of one Parquet file of a source, with columns `id` and `text`."""

    uri: str
    first: int
    last: int
    source: str

    @property
    def key(self) -> str:
        """The name of its result: what it is, not where it came in a list."""
        name = f"{self.source}:{self.uri.rsplit('/', 1)[-1]}:{self.first}:{self.last}"
        return xxhash.xxh3_128_hexdigest(name.encode())

    def tables(self) -> Iterator[pa.Table]:
        """Columns `id` and `text`, about a thousand documents at a time.

        Raises:
            DataError: the file is damaged.
        """
        fs, path = arrow_filesystem(self.uri)
        groups = list(range(self.first, self.last))
        try:
            with fs.open_input_file(path) as handle:
                reader = pq.ParquetFile(handle)
                for batch in reader.iter_batches(_ROWS, row_groups=groups, columns=["id", "text"]):
                    yield pa.Table.from_batches([batch])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"a corpus file cannot be read: {error}", place=self.uri) from error


@dataclass(frozen=True)
class Layout:
    """What all workers of one run share.

    Attributes:
        work: URI of the scratch folder.
        output: URI of the artifact.
        buckets: how the documents of each source are spread, by the source's name; in the order of the shards.
        sequence_length: tokens in a sequence.
    """

    work: str
    output: str
    buckets: Mapping[str, Buckets]
    sequence_length: int

    def position(self, source: str) -> int:
        """Position of a source in the index."""
        return list(self.buckets).index(source)

    def shard(self, source: str, bucket: int) -> str:
        """Name of a bucket's shard: numbered on through all sources of a side of the split."""
        own = self.buckets[source]
        held = own.split(bucket) == "heldout"
        number = bucket - own.train if held else bucket
        for name, before in self.buckets.items():
            if name == source:
                break
            number += before.held if held else before.train
        return f"shard-{number:05d}.bin"

    def encoded(self, unit: Unit) -> str:
        """Where a unit's result lies."""
        return join(self.work, "encoded", f"{unit.key}.arrow")


@dataclass(frozen=True)
class Packed:
    """One packed bucket: its shard (None when it filled no sequence), documents, text bytes, token counts [V]."""

    source: str
    bucket: int
    shard: Shard | None
    documents: int
    text_bytes: int
    counts: Counts


def plan_units(folder: str, text_bytes: int, source: str) -> list[Unit]:
    """The units of a folder of Parquet files, by file name and row group.

    Args:
        folder: URI of the folder.
        text_bytes: UTF-8 bytes of text in all files; decides the size of a unit.
        source: name of the source they belong to.

    Raises:
        DataError: there is no Parquet file, one cannot be read or lacks a column, or none holds a row.
    """
    files = [join(folder, name) for name, _ in list_files(folder) if name.endswith(".parquet")]
    if not files:
        raise DataError("the corpus holds no Parquet files", place=folder, mend="run the curate stage again")
    with ThreadPoolExecutor(16) as pool:
        size = max(MIN_UNIT_BYTES, text_bytes // MAX_UNITS)
        units = [unit for own in pool.map(lambda uri: _file_units(uri, size, source), files) for unit in own]
    if not units:
        raise DataError("the corpus holds no documents", place=folder, mend="give more input or looser rules")
    return units


def _file_units(uri: str, unit_bytes: int, source: str) -> list[Unit]:
    fs, path = arrow_filesystem(uri)
    try:
        with fs.open_input_file(path) as handle:
            metadata = pq.read_metadata(handle)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"a corpus file cannot be read: {error}", place=uri) from error
    if absent := {"id", "text"} - set(metadata.schema.to_arrow_schema().names):
        raise DataError(f"a corpus file has no column {' and '.join(sorted(absent))}", place=uri)
    units, first, size = [], 0, 0
    for group in range(metadata.num_row_groups):
        size += metadata.row_group(group).total_byte_size
        if size >= unit_bytes or group == metadata.num_row_groups - 1:
            units.append(Unit(uri, first, group + 1, source))
            first, size = group + 1, 0
    return units if metadata.num_rows else []


def sample_unit(unit: Unit, share: float, heldout: float) -> pa.Table:
    """The documents of a unit that a tokenizer is trained on: columns `id`, `text`."""
    tables = [t.filter(pa.array(in_sample(t["id"].to_pylist(), share, heldout))) for t in unit.tables()]
    return (
        pa.concat_tables(tables) if tables else pa.table({"id": pa.array([], "string"), "text": pa.array([], "string")})
    )


def encode_unit(unit: Unit, encoder: Encoder, layout: Layout) -> int:
    """Encodes a unit and writes its result at once or not at all; returns its number of tokens."""
    empty = pa.table({"id": pa.array([], pa.string()), "text": pa.array([], pa.string())})
    buckets = layout.buckets[unit.source]
    tables = [encode_table(t, encoder, buckets) for t in unit.tables()]
    encoded = pa.concat_tables(tables or [encode_table(empty, encoder, buckets)])
    sink = io.BytesIO()
    schema = encoded.schema.remove(encoded.schema.get_field_index("bucket"))
    with pa.ipc.new_file(sink, schema) as writer:
        for table in by_bucket(encoded, buckets.total):
            writer.write_batch(_one_batch(table))
    write_bytes(layout.encoded(unit), sink.getvalue())
    return sum(len(chunk.values) for chunk in encoded["tokens"].chunks)


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    arrays = [c.combine_chunks() if c.num_chunks != 1 else c.chunk(0) for c in table.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=table.schema)


def read_bucket(units: list[Unit], bucket: int, layout: Layout) -> pa.Table:
    """The encoded documents of one bucket from all units of one source.

    Raises:
        DataError: a unit's result is damaged.
    """
    batches = []
    for unit in units:
        uri = layout.encoded(unit)
        fs, path = arrow_filesystem(uri)
        try:
            with fs.open_input_file(path) as handle:
                batches.append(pa.ipc.open_file(handle).get_batch(bucket))
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"encoded documents cannot be read: {error}", place=uri, mend="run the recipe again"
            ) from error
    return pa.Table.from_batches(batches)


def pack_bucket(units: list[Unit], source: str, bucket: int, encoder: Encoder, layout: Layout) -> Packed:
    """Packs one bucket of a source into one shard of the output, or returns what an earlier try already packed.

    `units` may hold those of other sources too. Memory: the tokens of one bucket, three times.
    """
    split = layout.buckets[source].split(bucket)
    name = layout.shard(source, bucket)
    done = join(layout.work, "packed", split, f"{name}.npz")
    if exists(done):
        packed = load_packed(read_bytes(done))
        if packed.shard is None or exists(join(layout.output, split, name)):
            return packed
    table = read_bucket([unit for unit in units if unit.source == source], bucket, layout)
    sequences = pack_table(table, layout.sequence_length, encoder.pad_id, keep_tail=split == "heldout")
    shard = _write_shard(sequences, name, encoder.vocab_size, join(layout.output, split), layout.position(source))
    text_bytes = int(np.sum(table["bytes"].to_numpy()))
    packed = Packed(source, bucket, shard, table.num_rows, text_bytes, token_counts(sequences, encoder.vocab_size))
    write_bytes(done, dump_packed(packed))
    return packed


def _write_shard(sequences: Sequences, name: str, vocab_size: int, folder: str, position: int) -> Shard | None:
    if not len(sequences):
        return None
    with TemporaryDirectory() as local:
        shard = write_shard(Path(local) / name, sequences, token_dtype(vocab_size), position)
        upload(local, folder)
    return shard


def dump_packed(packed: Packed) -> bytes:
    """A packed bucket's record as bytes."""
    shard = packed.shard.model_dump() if packed.shard else None
    record = {
        "source": packed.source, "bucket": packed.bucket, "shard": shard, "documents": packed.documents,
        "text_bytes": packed.text_bytes,
    }  # fmt: skip
    sink = io.BytesIO()
    np.savez(sink, counts=packed.counts, record=np.frombuffer(json.dumps(record).encode(), dtype=np.uint8))
    return sink.getvalue()


def load_packed(data: bytes) -> Packed:
    """The record that :func:`dump_packed` wrote."""
    stored = np.load(io.BytesIO(data), allow_pickle=False)
    record = json.loads(stored["record"].tobytes())
    shard = Shard(**record["shard"]) if record["shard"] else None
    return Packed(
        record["source"], record["bucket"], shard, record["documents"], record["text_bytes"], stored["counts"]
    )
