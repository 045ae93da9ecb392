"""One seam for local paths and `s3://`: every filesystem object in modelyard is built here.

pyarrow ignores `AWS_ENDPOINT_URL` while s3fs honours it, so both are built from the same
environment here and passed explicitly to whoever reads (Ray Data, pyarrow, fsspec). A local folder
is written as a plain absolute path; `file://` is accepted.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec
import pyarrow.fs as pafs

from modelyard.errors import StorageError

_TEMPORARY = re.compile(r"(^|/)\.[^/]*\.[0-9]+\.tmp$")


@dataclass(frozen=True)
class FileRef:
    """One raw file: its URI, its size in bytes and a digest of its content (or the store's ETag).

    `name` is the path below the fixed part of the pattern that found it: unlike the URI it is the
    same on every machine, so results may depend on it.
    """

    uri: str
    bytes: int
    digest: str
    name: str = ""


@dataclass(frozen=True)
class Files:
    """Raw files given to a stage, in a fixed order. `digest` covers names and contents."""

    refs: tuple[FileRef, ...]
    digest: str

    @property
    def bytes(self) -> int:
        return sum(ref.bytes for ref in self.refs)


def is_remote(uri: str) -> bool:
    """Whether `uri` names an object store rather than a local path."""
    return "://" in uri and not uri.startswith("file://")


ENDPOINTS = "MODELYARD_S3_ENDPOINTS"
"""Environment variable that carries a recipe's endpoints to worker processes: JSON, bucket or `*` -> URL."""


def use_endpoints(endpoint: str | Mapping[str, str] | None) -> None:
    """Sets the S3 endpoints of this process and of those it starts: for every bucket, or by bucket."""
    if endpoint:
        os.environ[ENDPOINTS] = json.dumps({"*": endpoint} if isinstance(endpoint, str) else dict(endpoint))
    else:
        os.environ.pop(ENDPOINTS, None)


def endpoint_url(uri: str) -> str | None:
    """The S3 endpoint of a URI's bucket, or None for AWS.

    From the recipe, else from the environment (`AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`).
    """
    given = json.loads(os.environ.get(ENDPOINTS) or "{}")
    found = given.get(urlsplit(uri).netloc) or given.get("*")
    return found or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """An fsspec filesystem for `uri` and the path inside it.

    Raises:
        StorageError: the scheme is neither local nor `s3://`.
    """
    if not is_remote(uri):
        path = uri.removeprefix("file://")
        return fsspec.filesystem("file", auto_mkdir=True), os.path.abspath(os.path.expanduser(path))
    scheme = urlsplit(uri).scheme
    if scheme != "s3":
        raise StorageError(f"{scheme}:// is not supported", place=uri, mend="use a local path or s3://bucket/prefix")
    endpoint = endpoint_url(uri)
    options: dict[str, Any] = {"endpoint_url": endpoint} if endpoint else {}
    # Listings of a shared bucket change under us: another worker's files must be seen at once.
    return fsspec.filesystem("s3", use_listings_cache=False, **options), uri.removeprefix("s3://").rstrip("/")


def arrow_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The same as :func:`filesystem` for pyarrow and Ray Data."""
    if not is_remote(uri):
        return pafs.LocalFileSystem(), filesystem(uri)[1]
    _, path = filesystem(uri)
    endpoint = endpoint_url(uri)
    if endpoint is None:
        return pafs.S3FileSystem(), path
    parts = urlsplit(endpoint)
    return pafs.S3FileSystem(
        endpoint_override=parts.netloc, scheme=parts.scheme, region=os.environ.get("AWS_REGION", "us-east-1")
    ), path


def join(uri: str, *parts: str) -> str:
    """`uri` with path components appended."""
    return posixpath.join(uri.rstrip("/"), *parts) if parts else uri


def absolute(uri: str) -> str:
    """A URI that means the same in every process: local paths become absolute."""
    return uri.rstrip("/") if is_remote(uri) else filesystem(uri)[1]


@contextmanager
def reached(uri: str) -> Iterator[None]:
    """Names what keeps the body from an S3 URI; a missing file stays a FileNotFoundError.

    Raises:
        StorageError: no credentials, not allowed, or no answer.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except Exception as error:  # s3fs, botocore and aiohttp share no base class
        if not is_remote(uri):
            raise
        # Named by class, so that local work never loads botocore.
        names = {cls.__name__ for cls in type(error).__mro__}
        if names & {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}:
            mend = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or run where a role gives them"
        elif isinstance(error, PermissionError):
            mend = "these credentials may not read it: check them and the bucket's policy"
        elif names & {"BotoCoreError", "ClientError", "OSError"}:
            mend = "check the network and the endpoint (`endpoint` in the recipe, or AWS_ENDPOINT_URL)"
        else:
            raise
        raise StorageError(f"cannot be reached: {error}", place=uri, mend=mend) from error


def exists(uri: str) -> bool:
    """Whether a file or folder is there. Raises StorageError when that cannot be told."""
    fs, path = filesystem(uri)
    with reached(uri):
        return bool(fs.exists(path))


def read_bytes(uri: str) -> bytes:
    """The content of one file. Raises StorageError when it cannot be read."""
    fs, path = filesystem(uri)
    try:
        with reached(uri):
            return bytes(fs.cat_file(path))
    except OSError as error:
        raise StorageError(f"cannot read: {error}", place=uri) from error


def write_bytes(uri: str, data: bytes) -> None:
    """Writes one file so that readers see the old content or the new, never a part.

    POSIX: a temporary neighbour, fsync, rename. S3: one PUT, which is atomic.
    """
    fs, path = filesystem(uri)
    if is_remote(uri):
        fs.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(target)


def list_files(uri: str) -> Iterator[tuple[str, int]]:
    """Relative path and size in bytes of every file below a folder, sorted; nothing if it is absent.

    What `write_bytes` of a killed process left half-written is no file: it was never renamed.
    """
    fs, path = filesystem(uri)
    with reached(uri):
        if not fs.exists(path):
            return
        found = fs.find(path, detail=True)
    prefix = path.rstrip("/") + "/"
    for name in sorted(found):
        if found[name]["type"] == "file" and not _TEMPORARY.search(name):
            yield name.removeprefix(prefix), int(found[name]["size"] or 0)


def remove(uri: str) -> None:
    """Removes a file or folder and all below it; absent is fine."""
    fs, path = filesystem(uri)
    if fs.exists(path):
        fs.rm(path, recursive=True)


def upload(local: Path | str, uri: str) -> None:
    """Copies a local folder's content below `uri` (local or remote)."""
    root = Path(local)
    fs, path = filesystem(uri)
    for file in sorted(p for p in root.rglob("*") if p.is_file()):
        target = posixpath.join(path, file.relative_to(root).as_posix())
        if not is_remote(uri):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
        fs.put_file(str(file), target)


def download(uri: str, local: Path | str) -> Path:
    """Copies a folder's content below a local folder and returns that folder."""
    fs, path = filesystem(uri)
    target = Path(local)
    for name, _ in list_files(uri):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(posixpath.join(path, name), str(target / name))
    return target
