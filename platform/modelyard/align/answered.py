"""An answer on its way to being rewarded, and what a source of rewards says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Answered:
    """An answer to a task: the task's record and place, the rendered prompt, the answer's text, the token ids of both
    as a reward model reads them, what its environment paid, why that broke it off, if it did, and where among the ids
    the answer begins."""

    row: Mapping[str, Any] = field(hash=False)
    place: str
    prompt: str
    text: str
    ids: tuple[int, ...] = ()
    earned: float = 0.0
    failure: str = ""
    start: int = 0


@dataclass(frozen=True)
class Failure:
    """Why an answer has no reward."""

    why: str


Value = float | Failure
