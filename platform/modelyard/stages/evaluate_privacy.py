"""Originals of what was scrubbed: read again from the raw input, and kept in memory only.

The corpus names the source of every document and how many entities were scrubbed from it. The raw
sources are read once more by the corpus' own readers, scanned by its own kernels, and each value found
becomes a probe: the scrubbed text before it as context, and the value to look for.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from modelyard.corpus.filter_options import ScrubOptions
from modelyard.corpus.options import ReadOptions
from modelyard.corpus.read.formats import records
from modelyard.corpus.read.records import Record
from modelyard.corpus.read.units import Piece
from modelyard.corpus.steps.scrub import Scrub
from modelyard.errors import StorageError
from modelyard.evaluate.privacy import Finding, Probe, Scan, fair
from modelyard.stages.curate import CurateOptions
from modelyard.storage import Artifact, ArtifactStore, filesystem, list_files

_CONTEXT_CHARACTERS = 800
_ENOUGH = 4
"""Values collected per value wanted, so that the choice among them is not that of a few files."""
_BATCH = 256


@dataclass(frozen=True)
class Originals:
    """What was found in the raw sources.

    Attributes:
        probes: the values to try, mixed over the types.
        known: (type, lower-case value) of every value found. Never shown.
        sources: raw sources read.
        unreadable: sources of scrubbed documents that are no longer there or cannot be read.
        scrub: what was scrubbed and so looked for.
    """

    probes: tuple[Probe, ...]
    known: frozenset[Finding] = field(repr=False)
    sources: int
    unreadable: int
    scrub: ScrubOptions


def scanner(scrub: ScrubOptions | None) -> Scan:
    """The corpus room's scanner over plain strings; None = the default step's types."""
    from modelyard.corpus.entities import find

    scrub = scrub or ScrubOptions()
    types, region = frozenset(scrub.actions), scrub.region

    def scan(texts: Sequence[str]) -> list[list[Finding]]:
        found = find(pa.array(texts, pa.string()), types, region)
        return [[(span.type, span.text) for span in found.get(i, [])] for i in range(len(texts))]

    return scan


def how_scrubbed(corpus: Artifact) -> tuple[ScrubOptions, ReadOptions]:
    """The scrub step that made a corpus, and how the raw input was read, through chained curate stages.

    A corpus that was never scrubbed is looked at as if by the default step.
    """
    scrub: ScrubOptions | None = None
    while True:
        options = CurateOptions.model_validate(corpus.manifest.options)
        scrub = scrub or options.scrub
        before = corpus.manifest.inputs.get("files")
        if before is None or before.uri is None:
            return scrub or ScrubOptions(), options.read
        corpus = ArtifactStore(before.uri).open(before.uri)


def originals(corpus: Artifact, wanted: int) -> Originals:
    """Reads raw sources, in an order by hash, until there are plenty of values.

    Args:
        corpus: a curate artifact.
        wanted: probes to return at most.
    """
    scrub, read = how_scrubbed(corpus)
    probes: list[Probe] = []
    read_ok = unreadable = 0
    for source in _sources(corpus):
        found = _probes(source, read, scrub)
        if found is None:
            unreadable += 1
            continue
        read_ok += 1
        probes += itertools.islice(found, _ENOUGH * wanted)
        if len(probes) >= _ENOUGH * wanted:
            break
    known = frozenset((p.type, p.canonical) for p in probes)
    return Originals(tuple(_mixed(fair(probes))[:wanted]), known, read_ok, unreadable, scrub)


def _sources(corpus: Artifact) -> list[str]:
    """Sources of documents from which something was scrubbed, in an order by hash."""
    from modelyard.corpus.files import read_parquet

    found: set[str] = set()
    for name, _ in list_files(corpus.join("data")):
        for table in read_parquet(corpus.join("data", name), 100_000, None):
            if "entities" in table.column_names:
                table = table.filter(pc.greater(table["entities"], 0))
            found.update(table["source"].unique().to_pylist())
    return sorted(found, key=_hash)


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _probes(source: str, read: ReadOptions, scrub: ScrubOptions) -> Iterator[Probe] | None:
    """Probes of one source as they are read; None when it is not there."""
    try:
        fs, path = filesystem(source)
        size = fs.size(path) if fs.isfile(path) else None
    except (OSError, StorageError):
        return None
    if size is None:
        return None
    piece = Piece(source, "", int(size))
    texts = (
        text
        for record in records(piece, read)
        if isinstance(record, Record)
        for text in (record.text, record.prompt)
        if text
    )
    return _scan(texts, source, scrub)


def _scan(texts: Iterator[str], source: str, scrub: ScrubOptions) -> Iterator[Probe]:
    from modelyard.corpus.entities import find

    hide = _hider(scrub)
    while batch := list(itertools.islice(texts, _BATCH)):
        found = find(pa.array(batch, pa.string()), frozenset(scrub.actions), scrub.region)
        spans = [span for row in sorted(found) for span in found[row]]
        raw = [batch[s.document].encode()[: s.start].decode()[-_CONTEXT_CHARACTERS:] for s in spans]
        contexts = hide(pa.array(raw, pa.string())).to_pylist() if raw else []
        for span, context in zip(spans, contexts, strict=True):
            yield Probe(span.type, span.text, context, source)


def _hider(scrub: ScrubOptions) -> Any:
    """Scrubs contexts as the corpus was; what needs a key or drops a document becomes a placeholder."""
    actions = {
        name: "redact" if action in ("pseudonymize", "drop") else action for name, action in scrub.actions.items()
    }
    return Scrub(ScrubOptions.model_validate(scrub.model_dump() | actions)).rewrite


def _mixed(probes: list[Probe]) -> list[Probe]:
    """Probes of all types in turn, each type in an order by hash of the value."""
    by_type: dict[str, list[Probe]] = defaultdict(list)
    for probe in sorted(probes, key=lambda p: _hash(p.canonical)):
        by_type[probe.type].append(probe)
    turns = itertools.zip_longest(*(by_type[kind] for kind in sorted(by_type)))
    return [probe for turn in turns for probe in turn if probe is not None]
