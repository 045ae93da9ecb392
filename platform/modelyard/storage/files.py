"""Raw files by path, glob or URI: a fixed order, an optional cap, and digests of their contents."""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from modelyard.errors import DataError
from modelyard.storage.publish import checksum
from modelyard.storage.uri import FileRef, Files, filesystem, is_remote, reached, write_bytes

_MAGIC = "*?["


def find_files(
    paths: Sequence[str], exclude: Sequence[str] = (), max_bytes: int | None = None, cache: Path | None = None
) -> Files:
    """Lists and fingerprints raw files.

    Args:
        paths: files, folders, globs (`**` allowed) or `s3://` URIs.
        exclude: globs on the relative name of files to leave out.
        max_bytes: keep files, ordered by a hash of their name, until this many bytes are reached: the
            same choice on every machine, and an unbiased one.
        cache: a JSON file that remembers digests of local files by path, size and modification time.

    Returns:
        The files sorted by name. Memory grows with their number (about 400 B each).

    Raises:
        DataError: a pattern matches nothing, or a file cannot be read.
        StorageError: S3 cannot be reached.
    """
    found: dict[str, tuple[str, int, str]] = {}
    for pattern in paths:
        for uri, size, name, tag in _expand(pattern):
            if not any(fnmatch.fnmatch(name, rule) for rule in exclude):
                found.setdefault(uri, (name, size, tag))
    rows = sorted((name, uri, size, tag) for uri, (name, size, tag) in found.items())
    rows = _cap(rows, max_bytes)
    if not rows:
        raise DataError(
            "no file matches", place=", ".join(paths), mend="check the paths and the exclude globs of this input"
        )
    digests = _digests(rows, cache)
    refs = tuple(FileRef(uri, size, digest, name) for (name, uri, size, _), digest in zip(rows, digests, strict=True))
    total = hashlib.sha256()
    for ref in refs:
        total.update(f"{ref.name}\0{ref.digest}\n".encode())
    return Files(refs, total.hexdigest())


def _cap(rows: list[tuple[str, str, int, str]], max_bytes: int | None) -> list[tuple[str, str, int, str]]:
    if max_bytes is None:
        return rows
    kept, total = [], 0
    for row in sorted(rows, key=lambda r: hashlib.sha256(r[0].encode(errors="surrogateescape")).digest()):
        if total + row[2] <= max_bytes:
            kept.append(row)
            total += row[2]
    return sorted(kept)


def _expand(pattern: str) -> Iterable[tuple[str, int, str, str]]:
    """(uri, bytes, relative name, ETag or empty) of every file a pattern names."""
    with reached(pattern):
        rows = list(_expand_remote(pattern) if is_remote(pattern) else _expand_local(pattern))
    if not rows:
        raise DataError(
            "no file matches this input", place=pattern, mend="check the path; relative paths start where you run"
        )
    return rows


def _fixed_prefix(path: str) -> str:
    parts = path.split("/")
    magic = next((i for i, part in enumerate(parts) if any(c in part for c in _MAGIC)), len(parts) - 1)
    return "/".join(parts[:magic])


def _expand_local(pattern: str) -> Iterable[tuple[str, int, str, str]]:
    path = filesystem(pattern)[1]
    if os.path.isdir(path):
        path = os.path.join(path, "**")
    prefix = _fixed_prefix(path)
    for name in glob.iglob(path, recursive=True, include_hidden=False):
        try:
            if os.path.isfile(name):
                yield name, os.path.getsize(name), os.path.relpath(name, prefix), ""
        except OSError as error:
            raise DataError(f"cannot read: {error}", place=name) from error


def _expand_remote(pattern: str) -> Iterable[tuple[str, int, str, str]]:
    fs, path = filesystem(pattern)
    if not any(c in path for c in _MAGIC) and fs.isdir(path):
        path = path.rstrip("/") + "/**"
    prefix = _fixed_prefix(path)
    scheme = pattern.split("://", 1)[0]
    for name, info in fs.glob(path, detail=True).items():
        if info["type"] == "file":
            tag = str(info.get("ETag") or info.get("LastModified") or info["size"])
            yield f"{scheme}://{name}", int(info["size"]), name.removeprefix(prefix).lstrip("/"), tag.strip('"')


def _digests(rows: list[tuple[str, str, int, str]], cache: Path | None) -> list[str]:
    known: dict[str, list[object]] = {}
    if cache is not None and cache.exists():
        try:
            known = json.loads(cache.read_bytes())
        except ValueError:
            known = {}
    fresh: dict[str, list[object]] = {}

    def digest(row: tuple[str, str, int, str]) -> str:
        _, uri, _, tag = row
        if tag:
            return tag
        try:
            stat = Path(uri).stat()
            entry = known.get(uri)
            if entry is None or entry[:2] != [stat.st_size, stat.st_mtime_ns]:
                entry = [stat.st_size, stat.st_mtime_ns, checksum(uri)]
        except OSError as error:
            raise DataError(f"cannot read: {error}", place=uri, mend="mend its permissions or exclude it") from error
        fresh[uri] = entry
        return str(entry[2])

    with ThreadPoolExecutor(8) as pool:
        result = list(pool.map(digest, rows))
    if cache is not None and any(known.get(k) != v for k, v in fresh.items()):
        write_bytes(str(cache), json.dumps(known | fresh).encode())
    return result
