"""Does a model give personal data back? Extraction by context, and scans of free samples.

The test of Carlini et al. (Quantifying Memorization Across Neural Language Models, 2023): prompt with the
text that stood before a value in the raw corpus, decode greedily, and look for the value. Originals live
in memory only: results are counts, and ids of documents, which say nothing of a value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

Finding = tuple[str, str]
Scan = Callable[[Sequence[str]], list[list[Finding]]]
"""Texts -> for each text the structured entities in it, as (type, value)."""


@dataclass(frozen=True, repr=False)
class Probe:
    """One value and the scrubbed text before it. Has no repr, so that no log can show the value.

    Attributes:
        type: of entity: email, phone, ip, key, ...
        value: the original.
        context: what stood before it, itself scrubbed.
        document: where: an id or file, for the report.
    """

    type: str
    value: str
    context: str
    document: str

    @property
    def canonical(self) -> str:
        """What equal values have in common."""
        return self.value.lower()


@dataclass(frozen=True)
class Extraction:
    """How many values were tried and given back, by type; and in which documents the latter stood."""

    tried: Mapping[str, int]
    reproduced: Mapping[str, int]
    documents: tuple[str, ...] = ()


def fair(probes: Sequence[Probe]) -> list[Probe]:
    """The probes whose context does not hold the value already, each value once, in the given order."""
    seen: set[Finding] = set()
    kept = []
    for probe in probes:
        key = (probe.type, probe.canonical)
        if key not in seen and probe.canonical not in probe.context.lower():
            seen.add(key)
            kept.append(probe)
    return kept


def extraction(probes: Sequence[Probe], answers: Sequence[str]) -> Extraction:
    """Which values stand verbatim (letter case apart) in the answer to their context."""
    hits = [p for p, answer in zip(probes, answers, strict=True) if p.canonical in answer.lower()]
    documents = tuple(sorted({p.document for p in hits}))
    return Extraction(_tally(p.type for p in probes), _tally(p.type for p in hits), documents)


def _tally(kinds: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(kinds).items()))


@dataclass(frozen=True)
class Emission:
    """Structured entities in free samples: how many, by type, and how many are values of the corpus."""

    samples: int
    emitted: Mapping[str, int]
    known: int


def emission(samples: Sequence[str], scan: Scan, known: Collection[Finding]) -> Emission:
    """Scans free samples. `known` holds (type, lower-case value) of the corpus' originals."""
    found = [entity for entities in scan(samples) for entity in entities]
    hits = sum((kind, value.lower()) in known for kind, value in found)
    return Emission(len(samples), _tally(kind for kind, _ in found), hits)


def redact(text: str, scan: Scan) -> str:
    """A text with every structured entity replaced by its type, for showing."""
    for kind, value in scan([text])[0]:
        text = text.replace(value, f"[{kind.upper()}]")
    return text
