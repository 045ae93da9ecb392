"""Compiled kernels find a place for their cache when the package cannot be written to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    folder, value = done.stdout.split()
    assert folder == str(tmp_path / "modelyard" / "numba") and value == "3"
    assert list((tmp_path / "modelyard" / "numba").rglob("*.nbi"))
    assert (tmp_path / "modelyard" / "numba").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path: Path) -> None:
    open_folder = tmp_path / "modelyard" / "numba"
    open_folder.mkdir(parents=True)
    open_folder.chmod(0o777)
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] != str(open_folder)
