"""Rows of JSONL that several processes append to one folder, or objects on S3."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modelyard.storage import is_remote, join, write_bytes


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
