"""Free memory: the machine's, or what a container leaves of it."""

from __future__ import annotations

from pathlib import Path

import psutil

from modelyard.planner.machine import container_rooms, free_memory


def _group(folder: Path, limit: str, usage: str, names: tuple[str, str], cached: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 1\ninactive_file {cached}\n")


def test_unified_groups_bound_by_every_level(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current")
    _group(tmp_path / "a", "1000", "400", names, cached=100)
    _group(tmp_path / "a/b", "max", "300", names)
    ours = tmp_path / "cgroup"
    ours.write_text("0::/a/b\n")
    assert container_rooms(tmp_path, ours) == [700]


def test_first_version_groups_and_a_container_that_sees_only_its_own(tmp_path: Path) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    _group(tmp_path / "memory", "500", "600", names)
    ours = tmp_path / "cgroup"
    ours.write_text("4:memory:/docker/1234\n3:cpu:/\n0::/\n")
    assert container_rooms(tmp_path, ours) == [0]


def test_no_groups_means_no_bound(tmp_path: Path) -> None:
    assert container_rooms(tmp_path, tmp_path / "missing") == []
    assert 0 < free_memory() <= psutil.virtual_memory().total
