"""Model folders from wherever they lie to this node."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

from modelyard.storage import filesystem, is_remote, join, list_files


def local_folder(model: str, *, weights: bool) -> Path:
    """The model's folder on this node; a remote one is copied once to the cache (`~/.cache/modelyard/served`).

    The cache is keyed by the URI and the sizes of its files and may be deleted at any time.
    """
    if not is_remote(model):
        return Path(model.removeprefix("file://"))
    files = [(name, size) for name, size in list_files(model) if weights or not name.endswith(".safetensors")]
    key = hashlib.sha256(repr((model, files)).encode()).hexdigest()[:24]
    target = Path.home() / ".cache" / "modelyard" / "served" / key
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent))
    for name, _ in files:
        fs, path = filesystem(join(model, name))
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        fs.get_file(path, str(part / name))
    try:
        part.rename(target)
    except OSError:  # another replica of this node was faster
        shutil.rmtree(part)
    return target
