"""Compiled kernels find a place for their cache when the package cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import modelyard

CODE = """
import os
real = os.access
os.access = lambda path, mode, **k: False if 'kernels' in str(path) and mode == os.W_OK else real(path, mode, **k)
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
    from modelyard.corpus import kernels

    open_folder = tmp_path / "modelyard" / "numba"
    open_folder.mkdir(parents=True)
    open_folder.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels._config, "CACHE_DIR", "")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)
    assert kernels._cache_folder() != str(open_folder)
    open_folder.chmod(0o700)
    assert kernels._cache_folder() == str(open_folder)
