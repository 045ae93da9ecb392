"""Compiled kernels find a place for their cache when the package cannot be written to, and leave old code there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import modelyard

CODE = """
import os
real = os.access
os.access = lambda path, mode, **k: False if 'modelyard' in str(path) and mode == os.W_OK else real(path, mode, **k)
from modelyard.corpus.kernels.text import width
import numba
print(numba.config.CACHE_DIR, width(0xE2))
"""


def test_a_read_only_package_caches_in_the_users_folder(tmp_path: Path) -> None:
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(modelyard.__file__).parents[1])}
    env.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    folder, value = done.stdout.split()
    assert folder == str(tmp_path / "modelyard" / "numba") and value == "3"
    assert list((tmp_path / "modelyard" / "numba").rglob("*.nbi"))
    assert (tmp_path / "modelyard" / "numba").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from modelyard import jit

    open_folder = tmp_path / "modelyard" / "numba"
    open_folder.mkdir(parents=True)
    open_folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(jit._config, "CACHE_DIR", "")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert jit._cache_folder() != str(open_folder)
    open_folder.chmod(0o700)
    assert jit._cache_folder() == str(open_folder)


def test_kernels_are_compiled_again_when_a_file_they_take_from_has_changed(tmp_path: Path) -> None:
    """The hash of a word is begun by a constant of another file, and Numba alone would go on with the old one."""
    folder = tmp_path / "modelyard"
    shutil.copytree(Path(modelyard.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numpy as np; from modelyard.corpus.kernels.minhash import FOLD, word_shingles\n"
        "out = np.zeros(2, np.uint64); word_shingles(np.frombuffer(b'word', np.uint8), 0, 4, 1, FOLD, out)\n"
        "print(out[0], sum(word_shingles.stats.cache_hits.values()))"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run() -> tuple[str, str]:
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        value, hits = done.stdout.split()
        return value, hits

    first = run()
    assert first[1] == "0" and run() == (first[0], "1")
    with (folder / "corpus" / "kernels" / "text.py").open("a") as file:
        file.write("SEED = np.uint64(1)\n")
    changed, hits = run()
    assert changed != first[0] and hits == "0"
