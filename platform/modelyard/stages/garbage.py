"""What of a root may go: interrupted tries, scratch, and artifacts older than the newest few."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from modelyard.storage import Artifact, ArtifactStore, list_files, remove


@dataclass(frozen=True)
class Garbage:
    """A folder that may go, why, and its size in bytes."""

    uri: str
    reason: str
    bytes: int


def collect(root: str, keep: int) -> list[Garbage]:
    """Folders below `root` that may go.

    An artifact is kept while it is among the `keep` newest of its stage, while it registered a model
    (an alias may point at any version), or while a kept one was made from it.
    """
    store = ArtifactStore(root)
    artifacts = list(store.all())
    kept = _kept(artifacts, keep)
    old = [a.uri for a in artifacts if a.manifest.fingerprint not in kept]
    rows = [(uri, "not published (interrupted or running)") for uri in store.unpublished()]
    rows += [(uri, f"older than the newest {keep}") for uri in old]
    return [Garbage(uri, reason, sum(size for _, size in list_files(uri))) for uri, reason in rows]


def _kept(artifacts: Sequence[Artifact], keep: int) -> set[str]:
    newest: dict[tuple[str, str], int] = {}
    kept: set[str] = set()
    for artifact in sorted(artifacts, key=lambda a: a.manifest.ended, reverse=True):
        key = (artifact.manifest.recipe, artifact.stage)
        newest[key] = newest.get(key, 0) + 1
        if newest[key] <= keep or artifact.manifest.kind == "register":
            kept.add(artifact.manifest.fingerprint)
    by_fingerprint = {a.manifest.fingerprint: a for a in artifacts}
    frontier = list(kept)
    while frontier:
        artifact_or_none = by_fingerprint.get(frontier.pop())
        if artifact_or_none is None:
            continue
        for entry in artifact_or_none.manifest.inputs.values():
            if entry.stage and entry.fingerprint not in kept:
                kept.add(entry.fingerprint)
                frontier.append(entry.fingerprint)
    return kept


def delete(items: Sequence[Garbage]) -> None:
    """Removes the folders."""
    for item in items:
        remove(item.uri)
