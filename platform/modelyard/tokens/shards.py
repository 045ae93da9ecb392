"""Token shards: fixed-length sequences in memory-mapped files, and their only writer and reader.

    index.json             what the folder holds: see `Index`
    shard-00000.bin ...    records, one a sequence, no header

A shard holds sequences of one source (a corpus of the tokenize stage), and the shards of a source follow
each other: a source is a range of global sequence indices, so losses by source and mixtures of sources
need no column in the records.

A record of a sequence of L tokens is, little endian and without padding between fields:

    tokens  L x uint16 or uint32    uint16 when the vocabulary has at most 65,536 entries
    starts  ceil(L/8) bytes         bit i (most significant first) is set where a document begins at token i
    length  uint32                  tokens before padding; padding is only at the end

One record is one contiguous read, so a random sequence costs one or two pages whatever the size of
the data; the boundaries cost one bit a token (6 % of uint16).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from modelyard.errors import DataError
from modelyard.storage import join, write_bytes

FORMAT: Literal["modelyard-tokens"] = "modelyard-tokens"
INDEX = "index.json"
SHARD_BYTES = 256 << 20
"""A shard is closed before it would pass this size: large enough for object stores, small enough to move."""
_MEND = "remove the token artifact and run the tokenize stage again"
_CHUNK = 1 << 24
ONE_SOURCE = "corpus"
"""Name of the source of a folder that was written without naming one."""

DType = Literal["uint16", "uint32"]


class Source(BaseModel):
    """One source of a token folder: its name, and what its shards hold together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    sequences: int = Field(ge=0)
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)


class Shard(BaseModel):
    """One shard file: its sequences, tokens without padding, size, xxh3-128 digest, and the source's position."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sequences: int = Field(ge=1)
    tokens: int = Field(ge=1)
    bytes: int
    checksum: str
    source: int = Field(0, ge=0)


class Index(BaseModel):
    """What `index.json` holds. `text_bytes` are the UTF-8 bytes of text the tokens stand for.

    Version 1 knew no sources: it is read as one source named `corpus`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["modelyard-tokens"] = FORMAT
    version: Literal[1, 2] = 2
    sequence_length: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    dtype: DType
    sequences: int
    tokens: int
    documents: int
    text_bytes: int
    sources: tuple[Source, ...] = ()
    shards: tuple[Shard, ...]

    @model_validator(mode="after")
    def _sources_match(self) -> Index:
        if self.version == 2:
            held = [0] * len(self.sources)
            for shard in self.shards:
                if shard.source >= len(held):
                    raise ValueError(f"{shard.file} belongs to a source that is not listed")
                held[shard.source] += shard.sequences
            if held != [source.sequences for source in self.sources]:
                raise ValueError("the sequences of sources and shards do not add up")
            if [s.source for s in self.shards] != sorted(s.source for s in self.shards):
                raise ValueError("the shards of a source do not follow each other")
        return self


@dataclass(frozen=True)
class Sequences:
    """Packed sequences in memory: tokens [n, L] (any integer type), starts bool [n, L], lengths int [n]."""

    tokens: npt.NDArray[np.integer]
    starts: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.integer]

    def __len__(self) -> int:
        return len(self.tokens)


def token_dtype(vocab_size: int) -> DType:
    """The smallest type on disk that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def record_dtype(sequence_length: int, dtype: DType) -> np.dtype[np.void]:
    """The NumPy type of one record, as the module's docstring describes it."""
    width = "<u2" if dtype == "uint16" else "<u4"
    starts = ("u1", ((sequence_length + 7) // 8,))
    return np.dtype([("tokens", width, (sequence_length,)), ("starts", *starts), ("length", "<u4")])


def file_checksum(path: Path) -> str:
    """xxh3-128 of a local file, as in artifact manifests."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as handle:
        while block := handle.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def write_shard(path: Path, sequences: Sequences, dtype: DType, source: int = 0) -> Shard:
    """Writes one shard file and describes it; `source` is the position of its source in the index."""
    records = np.zeros(len(sequences), dtype=record_dtype(sequences.tokens.shape[1], dtype))
    records["tokens"] = sequences.tokens
    records["starts"] = np.packbits(sequences.starts, axis=1)
    records["length"] = sequences.lengths
    path.parent.mkdir(parents=True, exist_ok=True)
    records.tofile(path)
    return Shard(
        file=path.name,
        sequences=len(records),
        tokens=int(sequences.lengths.sum()),
        bytes=records.nbytes,
        checksum=file_checksum(path),
        source=source,
    )


def describe_source(name: str, position: int, shards: Iterable[Shard], documents: int, text_bytes: int) -> Source:
    """The index's entry of the source at `position`, from all shards of the folder and what was packed."""
    own = [shard for shard in shards if shard.source == position]
    return Source(
        name=name,
        sequences=sum(s.sequences for s in own),
        tokens=sum(s.tokens for s in own),
        documents=documents,
        text_bytes=text_bytes,
    )


def make_index(sequence_length: int, vocab_size: int, shards: Iterable[Shard], sources: Sequence[Source]) -> Index:
    """The index of these shards, listed source by source, otherwise in the order given."""
    ordered = sorted(shards, key=lambda shard: shard.source)
    return Index(
        sequence_length=sequence_length,
        vocab_size=vocab_size,
        dtype=token_dtype(vocab_size),
        sequences=sum(s.sequences for s in sources),
        tokens=sum(s.tokens for s in sources),
        documents=sum(s.documents for s in sources),
        text_bytes=sum(s.text_bytes for s in sources),
        sources=tuple(sources),
        shards=tuple(ordered),
    )


def write_index(
    folder: str, sequence_length: int, vocab_size: int, shards: Iterable[Shard], sources: Sequence[Source]
) -> Index:
    """Writes `index.json` below a local or remote folder, last: it is what makes a folder readable."""
    index = make_index(sequence_length, vocab_size, shards, sources)
    write_bytes(join(folder, INDEX), (index.model_dump_json(indent=1) + "\n").encode())
    return index


class TokenWriter:
    """Writes a token folder in one process: `add` any number of times, then `close`.

    Args:
        folder: local folder; files of an older try with the same names are overwritten.
        sequence_length: tokens in a sequence.
        vocab_size: number of ids; decides the type on disk.
        shard_bytes: a shard is closed before it would pass this size.
    """

    def __init__(
        self, folder: Path | str, sequence_length: int, vocab_size: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.folder, self.sequence_length, self.vocab_size = Path(folder), sequence_length, vocab_size
        self.dtype = token_dtype(vocab_size)
        self._rows = max(1, shard_bytes // record_dtype(sequence_length, self.dtype).itemsize)
        self._shards: list[Shard] = []
        self._counts: dict[str, tuple[int, int]] = {}

    def add(self, sequences: Sequences, source: str = ONE_SOURCE, documents: int = 0, text_bytes: int = 0) -> None:
        """Writes sequences of one source as one shard, or several where they pass the size limit.

        `documents` and `text_bytes` are what the sequences stand for; they add up by source.
        """
        before = self._counts.setdefault(source, (0, 0))
        self._counts[source] = (before[0] + documents, before[1] + text_bytes)
        position = list(self._counts).index(source)
        for start in range(0, len(sequences), self._rows):
            rows = slice(start, start + self._rows)
            part = Sequences(sequences.tokens[rows], sequences.starts[rows], sequences.lengths[rows])
            name = f"shard-{len(self._shards):05d}.bin"
            self._shards.append(write_shard(self.folder / name, part, self.dtype, position))

    def close(self, documents: int = 0, text_bytes: int = 0) -> Index:
        """Writes the index. Without it no reader accepts the folder.

        `documents` and `text_bytes` are added to the first source's: all there is to say about a folder
        of one source.
        """
        counts = dict(self._counts) or {ONE_SOURCE: (0, 0)}
        first = next(iter(counts))
        counts[first] = (counts[first][0] + documents, counts[first][1] + text_bytes)
        sources = [describe_source(name, i, self._shards, *counts[name]) for i, name in enumerate(counts)]
        return write_index(str(self.folder), self.sequence_length, self.vocab_size, self._shards, sources)


def _read_index(folder: Path) -> Index:
    place = folder / INDEX
    try:
        raw = place.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the index of token shards: {error}", place=str(place), mend=_MEND) from error
    return parse_index(raw, str(place))


def parse_index(raw: bytes, place: str) -> Index:
    """The index that the bytes of an `index.json` at `place` are. Raises DataError when they are none."""
    try:
        return Index.model_validate(json.loads(raw))
    except ValidationError as error:
        raise DataError(f"the index of token shards is damaged: {error}", place=place, mend=_MEND) from error
    except ValueError as error:
        raise DataError("the index of token shards is not valid JSON", place=place, mend=_MEND) from error


def _check_shard(path: Path, shard: Shard, itemsize: int, verify: bool) -> None:
    """Raises DataError when a shard is absent, empty, cut short or (with `verify`) changed."""
    if not path.is_file():
        raise DataError("a token shard is missing", place=str(path), mend=_MEND)
    size = path.stat().st_size
    if size != shard.bytes or size != shard.sequences * itemsize:
        what = "is empty" if size == 0 else f"has {size:,} bytes where the index says {shard.bytes:,}"
        raise DataError(f"a token shard {what}", place=str(path), mend=_MEND)
    if verify and file_checksum(path) != shard.checksum:
        raise DataError("a token shard is damaged: its checksum differs from the index", place=str(path), mend=_MEND)


class TokenDataset:
    """Random access to the sequences of a token folder. Open it with :meth:`open`.

    Attributes:
        sequence_length: tokens in a sequence, L.
        vocab_size: number of token ids.
        tokens: tokens in all sequences, without padding.
        documents: documents they come from.
        text_bytes: UTF-8 bytes of text they stand for.
        sources: what each source holds, in the order of their sequences.
    """

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index
        self.sequence_length, self.vocab_size = index.sequence_length, index.vocab_size
        self.tokens, self.documents, self.text_bytes = index.tokens, index.documents, index.text_bytes
        self._dtype = record_dtype(index.sequence_length, index.dtype)
        self.sources = index.sources or (describe_source(ONE_SOURCE, 0, index.shards, self.documents, self.text_bytes),)
        self._source_ends = np.cumsum([s.sequences for s in self.sources])
        self._ends = np.cumsum([s.sequences for s in index.shards])
        self._maps: dict[int, npt.NDArray[np.void]] = {}

    @classmethod
    def open(cls, folder: Path | str, *, verify: bool = True) -> TokenDataset:
        """Opens a local token folder and checks it.

        Args:
            folder: the folder that holds `index.json`.
            verify: read every shard once and compare its checksum. Without it only presence and
                size are checked, which is right where another process has just verified.

        Raises:
            DataError: a file is missing, empty, cut short, damaged, or there are no sequences.
        """
        path = Path(folder)
        return _checked(path, _read_index(path), verify)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[object, ...]:
        # Memory maps do not travel between processes; the index does, which may be of several folders together.
        return _checked, (self.folder, self.index, False)

    def source_range(self, name: str) -> range:
        """The global indices of a source's sequences. Raises KeyError for a name that is not in `sources`."""
        for source, end in zip(self.sources, self._source_ends.tolist(), strict=True):
            if source.name == name:
                return range(end - source.sequences, end)
        raise KeyError(f"no source {name!r}; there are {', '.join(s.name for s in self.sources)}")

    def source_of(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """Position in `sources` of each sequence's source, int64, the shape of `indices` (0..len-1)."""
        return np.searchsorted(self._source_ends, np.asarray(indices, dtype=np.int64), side="right").astype(np.int64)

    def batch(self, indices: npt.ArrayLike) -> dict[str, npt.NDArray[np.int64] | npt.NDArray[np.int32]]:
        """Reads sequences by their global index.

        Args:
            indices: integers in 0..len-1, [n]; repeats and any order are fine.

        Returns:
            `input_ids` int64 [n, L]; `document_ids` int32 [n, L], the number of the document within
            the sequence from 0, and -1 at padding.

        Raises:
            IndexError: an index is out of range.
            DataError: a record holds an id outside the vocabulary or an impossible length.
        """
        wanted = np.asarray(indices, dtype=np.int64).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            raise IndexError(f"sequence index outside 0..{len(self) - 1}")
        records = np.empty(len(wanted), dtype=self._dtype)
        owners = np.searchsorted(self._ends, wanted, side="right")
        for owner in np.unique(owners):
            mine = owners == owner
            first = self._ends[owner] - self.index.shards[owner].sequences
            records[mine] = self._records(int(owner), wanted[mine] - first)
            self._check(records[mine], int(owner))
        return {"input_ids": records["tokens"].astype(np.int64), "document_ids": self._document_ids(records)}

    def _document_ids(self, records: npt.NDArray[np.void]) -> npt.NDArray[np.int32]:
        starts = np.unpackbits(records["starts"], axis=1, count=self.sequence_length)
        # A sequence may open in the middle of a document: its first token is document 0 either way.
        starts[:, 0] = 0
        ids = np.cumsum(starts, axis=1, dtype=np.int32)
        ids[np.arange(self.sequence_length) >= records["length"][:, None]] = -1
        return ids

    def _records(self, shard: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Records of a shard by their row in it."""
        return self._map(shard)[rows]

    def _place(self, shard: int) -> str:
        return str(self.folder / self.index.shards[shard].file)

    def _map(self, shard: int) -> npt.NDArray[np.void]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.folder / self.index.shards[shard].file, dtype=self._dtype, mode="r")
        return self._maps[shard]

    def _check(self, records: npt.NDArray[np.void], shard: int) -> None:
        # Cheap (one maximum) and catches a damaged disk or file even where checksums were not compared.
        if records["tokens"].max() >= self.vocab_size or records["length"].max() > self.sequence_length:
            message = "a token shard is damaged: a record holds impossible values"
            raise DataError(message, place=self._place(shard), mend=_MEND)


def _checked(folder: Path, index: Index, verify: bool) -> TokenDataset:
    """See `TokenDataset.open`."""
    if not index.shards:
        raise DataError("the token folder holds no sequences", place=str(folder), mend="tokenize more text")
    itemsize = record_dtype(index.sequence_length, index.dtype).itemsize
    for shard in index.shards:
        _check_shard(folder / shard.file, shard, itemsize, verify)
    return TokenDataset(folder, index)
