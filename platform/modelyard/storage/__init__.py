"""Where bytes live: URIs on local disk or S3, manifests, and atomic publication of artifacts.

Knows nothing of stages, Ray or MLflow; everything above reads and writes through here.
"""

from modelyard.storage.files import find_files
from modelyard.storage.manifest import FileEntry, InputEntry, Manifest
from modelyard.storage.publish import Artifact, ArtifactStore, Draft
from modelyard.storage.uri import (
    FileRef,
    Files,
    absolute,
    arrow_filesystem,
    download,
    exists,
    filesystem,
    is_remote,
    join,
    list_files,
    read_bytes,
    remove,
    upload,
    use_endpoints,
    write_bytes,
)

__all__ = [
    "Artifact",
    "ArtifactStore",
    "Draft",
    "FileEntry",
    "FileRef",
    "Files",
    "InputEntry",
    "Manifest",
    "absolute",
    "arrow_filesystem",
    "download",
    "exists",
    "filesystem",
    "find_files",
    "is_remote",
    "join",
    "list_files",
    "read_bytes",
    "remove",
    "upload",
    "use_endpoints",
    "write_bytes",
]
