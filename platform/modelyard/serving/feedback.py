"""What people say about answers, as rows that preference training reads."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modelyard.serving.schema import FeedbackRequest
from modelyard.storage import is_remote, join, write_bytes


class FeedbackStore:
    """Appends one JSON line an opinion: a file a day and process in a folder, an object each on S3.

    A row has `prompt` (turns), `completion` and `label` (true = good), and with a corrected text also `chosen`
    (the correction) and `rejected` (the answer).

    Args:
        place: folder or s3:// URI.
    """

    def __init__(self, place: str) -> None:
        self._place = place

    async def add(self, body: FeedbackRequest, holder: str, version: str) -> str:
        """Keeps one opinion and returns its id. Raises StorageError or OSError when the place cannot be written."""
        name = uuid.uuid4().hex
        row = {"id": name, "time": datetime.now(UTC).isoformat(timespec="seconds"), "key": holder,
               "version": body.version or version, **_row(body)}  # fmt: skip
        await asyncio.to_thread(append_row, self._place, row)
        return name


def append_row(place: str, row: Mapping[str, Any]) -> None:
    """Keeps a row with an `id` and a `time`: a line in its day's file of a folder, or an object on S3.

    Raises StorageError or OSError when the place cannot be written.
    """
    line = (json.dumps(row, ensure_ascii=True) + "\n").encode()
    day = str(row["time"])[:10]
    if is_remote(place):
        write_bytes(join(place, day, f"{row['id']}.jsonl"), line)
        return
    folder = Path(place.removeprefix("file://"))
    folder.mkdir(parents=True, exist_ok=True)
    # One write of one line: processes that append to the same file do not mix their lines.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    with os.fdopen(os.open(folder / f"{day}.jsonl", flags, 0o600), "ab", buffering=0) as file:
        file.write(line)


def _row(body: FeedbackRequest) -> dict[str, Any]:
    row: dict[str, Any] = {
        "response": body.id, "model": body.model, "rating": body.rating, "label": body.rating == "up",
        "prompt": [m.plain() for m in body.messages] if body.messages else None, "completion": body.answer,
        "comment": body.comment,
    }  # fmt: skip
    if body.correction is not None:
        row |= {"chosen": body.correction, "rejected": body.answer}
    return row
