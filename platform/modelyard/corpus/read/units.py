"""Cuts input files into units: the portions of work that are done, kept and resumed as a whole.

Units depend on the files alone (their order, sizes and digests), never on workers or block layout, so
that an interrupted run finds its finished portions again and the output does not change with the cluster.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from modelyard.corpus.options import ReadOptions
from modelyard.storage import FileRef

_MIN_UNIT, _MAX_UNIT, _UNITS = 8_000_000, 64_000_000, 64
_SUFFIXES = {
    "jsonl": (".jsonl", ".ndjson"), "parquet": (".parquet",), "html": (".html", ".htm", ".xhtml"),
    "warc": (".warc", ".wet"),
}  # fmt: skip
_INFLATION = 4  # bytes of text a compressed byte stands for, roughly


@dataclass(frozen=True)
class Piece:
    """A file, or the lines of an uncompressed JSONL file that begin in bytes [start, end).

    `copy` counts earlier files of the same content, so that ids made from content stay unique.
    `artifact` marks Parquet of an earlier curate stage, whose ids and columns are kept.
    """

    uri: str
    digest: str
    bytes: int
    copy: int = 0
    start: int = 0
    end: int | None = None
    artifact: bool = False


@dataclass(frozen=True)
class Unit:
    """A portion of the input. `index` orders units; `key` identifies the content."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def key(self) -> str:
        """Hash of what the unit reads."""
        content = json.dumps([asdict(piece) for piece in self.pieces], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    @property
    def bytes(self) -> int:
        """Stored bytes to read."""
        return sum(p.bytes if p.end is None else p.end - p.start for p in self.pieces)


def file_format(uri: str, options: ReadOptions) -> str:
    """`text`, `jsonl`, `parquet`, `html` or `warc`."""
    if options.format != "auto":
        return options.format
    name = uri.lower().removesuffix(".gz").removesuffix(".zst")
    return next((kind for kind, suffixes in _SUFFIXES.items() if name.endswith(suffixes)), "text")


def is_compressed(uri: str) -> bool:
    """Whether the suffix says gzip or Zstandard."""
    return uri.lower().endswith((".gz", ".zst"))


def units(refs: Sequence[FileRef], options: ReadOptions, artifacts: frozenset[str] = frozenset()) -> list[Unit]:
    """Units over `refs` in their order: small files together, long JSONL files in ranges.

    A unit aims at a 64th of the input, at least 8 and at most 64 MB of text (a task costs 30 ms of
    CPU beside its work). A compressed or Parquet
    file is never cut. `artifacts` are the URIs among `refs` that are Parquet of a curate stage.
    """
    weights = [r.bytes * (_INFLATION if is_compressed(r.uri) else 1) for r in refs]
    size = min(max(sum(weights) // _UNITS, _MIN_UNIT), _MAX_UNIT)
    seen: Counter[str] = Counter()
    groups: list[list[Piece]] = [[]]
    filled = 0
    for ref, weight in zip(refs, weights, strict=True):
        piece = Piece(ref.uri, ref.digest, ref.bytes, seen[ref.digest], artifact=ref.uri in artifacts)
        seen[ref.digest] += 1
        parts = _ranges(piece, size) if _divisible(ref.uri, options) and ref.bytes > size else [piece]
        for part in parts:
            if groups[-1] and filled + weight // len(parts) > size:
                groups.append([])
                filled = 0
            groups[-1].append(part)
            filled += weight // len(parts)
    return [Unit(index, tuple(group)) for index, group in enumerate(g for g in groups if g)]


def _divisible(uri: str, options: ReadOptions) -> bool:
    return file_format(uri, options) == "jsonl" and not is_compressed(uri)


def _ranges(piece: Piece, size: int) -> list[Piece]:
    bounds = [*range(0, piece.bytes, size), piece.bytes]
    return [
        Piece(piece.uri, piece.digest, piece.bytes, piece.copy, start, end) for start, end in itertools.pairwise(bounds)
    ]
