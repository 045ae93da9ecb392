"""The manifest: what an artifact is, what made it, and the checksum of every file in it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from modelyard.errors import StorageError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


class FileEntry(BaseModel):
    """One file of an artifact: path below it, size, and the xxh3-128 digest of its bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    bytes: int
    checksum: str


class InputEntry(BaseModel):
    """One input: another stage's artifact (`stage` set) or raw files, and its fingerprint or digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    stage: str | None = None
    uri: str | None = None
    files: int = 0
    bytes: int = 0


class Manifest(BaseModel):
    """What `manifest.json` holds. Written last: its presence is what makes a folder an artifact."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int = FORMAT_VERSION
    stage: str
    kind: str
    kind_version: int
    fingerprint: str
    recipe: str
    options: dict[str, Any]
    inputs: dict[str, InputEntry]
    code_version: str
    started: datetime
    ended: datetime
    run_id: str | None = None
    summary: str = ""
    counts: dict[str, int] = {}
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {}
    files: list[FileEntry] = []

    @property
    def seconds(self) -> float:
        """Wall time the stage took."""
        return (self.ended - self.started).total_seconds()

    def dump(self) -> bytes:
        """The manifest as readable JSON."""
        return (self.model_dump_json(indent=1) + "\n").encode()

    @classmethod
    def parse(cls, data: bytes, place: str) -> Manifest:
        """Reads a manifest. Raises StorageError when it is damaged or of a newer format."""
        try:
            raw = json.loads(data)
            version = raw.get("format_version")
        except (ValueError, AttributeError) as error:
            raise StorageError("the manifest is not valid JSON", place=place, mend="remove the folder") from error
        if version != FORMAT_VERSION:
            raise StorageError(
                f"the manifest has format {version}, this modelyard reads {FORMAT_VERSION}",
                place=place,
                mend="use the modelyard version that wrote it, or remove the folder",
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise StorageError(f"the manifest is damaged: {error}", place=place, mend="remove the folder") from error
