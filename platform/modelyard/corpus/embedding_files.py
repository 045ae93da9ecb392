"""The files of a sentence-embedding model, and their checksum. Light: plans and schemas load it."""

from __future__ import annotations

from pathlib import Path

import xxhash

_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_CHUNK = 1 << 24


def model_files(folder: str) -> list[Path]:
    """Configuration, weights and tokenizer files directly in a folder, by name.

    Raises:
        ValueError: there is no `config.json`, no safetensors file, or no tokenizer.
    """
    place = Path(folder)
    files = sorted(p for p in place.iterdir() if p.suffix in _SUFFIXES and p.is_file()) if place.is_dir() else []
    names = {p.name for p in files}
    if "config.json" not in names or not any(p.suffix == ".safetensors" for p in files):
        raise ValueError(f"{folder} holds no model: give a folder with config.json and *.safetensors")
    if not names & {"tokenizer.json", "vocab.txt", "tokenizer.model"}:
        raise ValueError(f"{folder} holds no tokenizer: give the folder that the model was saved to with its tokenizer")
    return files


def model_checksum(folder: str) -> str:
    """xxh3-128 over names and contents of :func:`model_files`.

    Raises:
        ValueError: the folder holds no model, or a file cannot be read.
    """
    digest = xxhash.xxh3_128()
    for path in model_files(folder):
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        try:
            with path.open("rb") as handle:
                while block := handle.read(_CHUNK):
                    digest.update(block)
        except OSError as error:
            raise ValueError(f"{path} cannot be read") from error
    return digest.hexdigest()
