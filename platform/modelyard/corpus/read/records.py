"""What a reader yields: a readable record, a bad one, or one that is no document by its nature."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Reasons that say what a readable record is, not that it is damaged: they do not count as bad records.
NOT_DAMAGE = frozenset({"http_status", "content_type", "no_content", "empty_page"})


@dataclass(frozen=True)
class Record:
    """A readable record. `position` is its byte offset, row or number in the file."""

    position: int
    text: str
    prompt: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Bad:
    """A record that could not be read: where, why, and the beginning of its bytes.

    `offset` is the place in the stored file where it differs from `position`, as in compressed WARC files.
    """

    position: int
    reason: str
    detail: str = ""
    bytes: int = 0
    excerpt: str = ""
    offset: int | None = None


@dataclass(frozen=True)
class Skipped:
    """A record that carries no document (the request beside a response): counted under `kind`, not audited."""

    kind: str
