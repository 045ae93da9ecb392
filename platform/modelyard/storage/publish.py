"""Artifacts: immutable folders named by stage and fingerprint, published by writing the manifest last.

    {root}/artifacts/{stage}-{fingerprint12}/   files, then manifest.json
    {root}/work/{stage}-{fingerprint12}/        what survives a crash: checkpoints, intermediates

A folder under `artifacts/` without a manifest is an interrupted try, and `modelyard gc` says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import xxhash

from modelyard.errors import StorageError
from modelyard.storage import uri as u
from modelyard.storage.manifest import MANIFEST, FileEntry, Manifest

_CHUNK = 1 << 22


def checksum(uri: str) -> str:
    """xxh3-128 of one file's bytes, read in 4 MiB pieces."""
    fs, path = u.filesystem(uri)
    digest = xxhash.xxh3_128()
    with fs.open(path, "rb") as handle:
        while block := cast(IO[bytes], handle).read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A published artifact."""

    uri: str
    manifest: Manifest

    @property
    def stage(self) -> str:
        return self.manifest.stage

    def join(self, *parts: str) -> str:
        """URI of a file or folder inside."""
        return u.join(self.uri, *parts)

    def local(self, *parts: str) -> Path:
        """A local path of a file or folder inside; remote content is copied once to the cache.

        The cache (`~/.cache/modelyard`) is keyed by fingerprint, grows with what is read and may be
        deleted at any time.
        """
        if not u.is_remote(self.uri):
            return Path(u.filesystem(self.join(*parts))[1])
        target = Path.home() / ".cache" / "modelyard" / f"{self.stage}-{self.manifest.fingerprint[:12]}"
        prefix = "/".join(parts)
        for entry in self.manifest.files:
            if entry.path == prefix or entry.path.startswith(prefix + "/") or not prefix:
                self._fetch(entry, target)
        return target.joinpath(*parts)

    def _fetch(self, entry: FileEntry, target: Path) -> None:
        file = target / entry.path
        if file.exists() and file.stat().st_size == entry.bytes:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fs, path = u.filesystem(self.join(entry.path))
        part = file.with_name(file.name + ".part")
        fs.get_file(path, str(part))
        part.replace(file)

    def verify(self) -> None:
        """Reads every file again. Raises StorageError at the first that is missing or changed."""
        for entry in self.manifest.files:
            place = self.join(entry.path)
            if not u.exists(place) or checksum(place) != entry.checksum:
                raise StorageError(
                    "a file of the artifact is missing or has changed",
                    place=place,
                    mend=f"remove {self.uri} and run the recipe again",
                )


@dataclass(frozen=True)
class Draft:
    """An artifact being made: where to write it, and where to keep what should survive a crash."""

    uri: str
    work: str

    def publish(self, manifest: Manifest) -> Artifact:
        """Checksums all files, writes the manifest last and removes the scratch folder."""
        with ThreadPoolExecutor(8) as pool:
            names = [(n, s) for n, s in u.list_files(self.uri) if n != MANIFEST]
            sums = list(pool.map(lambda item: checksum(u.join(self.uri, item[0])), names))
        files = [FileEntry(path=n, bytes=s, checksum=c) for (n, s), c in zip(names, sums, strict=True)]
        full = manifest.model_copy(update={"files": files})
        u.write_bytes(u.join(self.uri, MANIFEST), full.dump())
        u.remove(self.work)
        return Artifact(self.uri, full)


class ArtifactStore:
    """All artifacts under one root."""

    def __init__(self, root: str) -> None:
        self.root = u.absolute(root)

    def check(self) -> None:
        """Writes and removes a probe. Raises StorageError when the root cannot be written."""
        probe = u.join(self.root, ".probe")
        try:
            u.write_bytes(probe, b"modelyard")
            u.remove(probe)
        except Exception as error:  # fsspec and botocore share no base class for access errors
            raise StorageError(
                f"the root cannot be written: {error}",
                place=self.root,
                mend="choose another root in the recipe or with --root, or mend its permissions",
            ) from error

    def draft(self, stage: str, fingerprint: str) -> Draft:
        """Where to make an artifact. What an interrupted try left in it stays for the stage to reuse."""
        name = f"{stage}-{fingerprint[:12]}"
        return Draft(u.join(self.root, "artifacts", name), u.join(self.root, "work", name))

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The published artifact, or None."""
        uri = self.draft(stage, fingerprint).uri
        place = u.join(uri, MANIFEST)
        if not u.exists(place):
            return None
        return Artifact(uri, Manifest.parse(u.read_bytes(place), place))

    def open(self, uri: str) -> Artifact:
        """An artifact by its URI. Raises StorageError when it has no manifest."""
        place = u.join(uri, MANIFEST)
        if not u.exists(place):
            raise StorageError("this is not a published artifact", place=uri, mend="run the stage that makes it")
        return Artifact(u.absolute(uri), Manifest.parse(u.read_bytes(place), place))

    def history(self, stage: str) -> list[Artifact]:
        """All published artifacts of a stage name, newest first."""
        found = [a for a in self.all() if a.stage == stage]
        return sorted(found, key=lambda a: a.manifest.ended, reverse=True)

    def all(self) -> Iterator[Artifact]:
        """All published artifacts, by folder name."""
        for folder in self._folders("artifacts"):
            if u.exists(u.join(folder, MANIFEST)):
                yield self.open(folder)

    def unpublished(self) -> list[str]:
        """Folders no manifest vouches for: interrupted tries and scratch."""
        drafts = [f for f in self._folders("artifacts") if not u.exists(u.join(f, MANIFEST))]
        return drafts + self._folders("work")

    def _folders(self, kind: str) -> list[str]:
        fs, path = u.filesystem(u.join(self.root, kind))
        if not fs.exists(path):
            return []
        names = sorted(str(name).rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(path, detail=False))
        return [u.join(self.root, kind, name) for name in names]
