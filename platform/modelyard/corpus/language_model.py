"""The language model that py3langid brings (BSD-3-Clause), unpacked once and shared by all workers of a machine."""

from __future__ import annotations

import functools
import hashlib
import io
import lzma
import os
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

_ARRAYS = ("moves", "rows", "outputs", "table", "prior", "languages")


@dataclass(frozen=True)
class LanguageModel:
    """Arrays as `kernels.language.scores` takes them; `codes` are ISO 639 codes, one a column of `table`."""

    moves: npt.NDArray[np.uint32]
    rows: npt.NDArray[np.uint16]
    outputs: npt.NDArray[np.int32]
    table: npt.NDArray[np.float32]
    prior: npt.NDArray[np.float32]
    codes: tuple[str, ...]

    def merged(self, scores: Any) -> tuple[Any, tuple[str, ...]]:
        """Probabilities [documents, distinct codes] of scores [documents, codes]: some languages have two scripts."""
        power = np.exp(scores - scores.max(axis=1, keepdims=True, initial=-np.inf))
        power /= power.sum(axis=1, keepdims=True)
        names = tuple(dict.fromkeys(self.codes))
        if len(names) == len(self.codes):
            return power, names
        place = {name: column for column, name in enumerate(names)}
        out = np.zeros((len(power), len(names)), power.dtype)
        for column, code in enumerate(self.codes):
            out[:, place[code]] += power[:, column]
        return out, names


@functools.cache
def load() -> LanguageModel:
    """The bundled model. Its 100 MB are memory-mapped from a cache, so workers share them.

    Unpacking takes a few seconds once a machine. Without a folder to write to, every process unpacks its own.
    """
    packed = files("py3langid").joinpath("data/model.npz.xz").read_bytes()
    folder = _folder(hashlib.sha256(packed).hexdigest()[:16])
    if folder is None:
        return _model(_unpack(packed))
    if not all((folder / f"{name}.npy").exists() for name in _ARRAYS):
        for name, array in _unpack(packed).items():
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as handle:
                np.save(handle, array)
            Path(handle.name).replace(folder / f"{name}.npy")
    return _model({name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _ARRAYS})


def _model(arrays: dict[str, Any]) -> LanguageModel:
    codes = tuple(str(code) for code in arrays["languages"])
    return LanguageModel(
        arrays["moves"], arrays["rows"], arrays["outputs"], arrays["table"], arrays["prior"], codes
    )  # fmt: skip


def _folder(name: str) -> Path | None:
    places = [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelyard"]
    places.append(Path(tempfile.gettempdir()) / f"modelyard-cache-{os.getuid()}")
    for place in places:
        folder = place / f"language-{name}"
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    return None


def _unpack(packed: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(lzma.decompress(packed)), allow_pickle=False) as stored:
        return {
            "moves": stored["nextmove"].astype(np.uint32), "rows": stored["nextmove_row"].astype(np.uint16),
            "outputs": stored["out_feat"].astype(np.int32), "table": stored["ptc"].astype(np.float32),
            "prior": stored["pc"].astype(np.float32), "languages": stored["classes"],
        }  # fmt: skip
