"""What this machine, or the container we run in, still has free."""

from __future__ import annotations

from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_OURS = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes a new process could hold: what the machine has available, or less where a container bounds us."""
    available = int(psutil.virtual_memory().available)
    return min([available, *container_rooms()])


def container_rooms(cgroups: Path = _CGROUPS, ours: Path = _OURS) -> list[int]:
    """Bytes left under each memory limit of the control groups (v2 or v1) this process is in; empty = no limit.

    Args:
        cgroups: where the hierarchy is mounted.
        ours: the file that names the groups of this process.
    """
    try:
        lines = ours.read_text("utf-8").splitlines()
    except OSError:
        return []
    rooms = []
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            top, limit, used = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            top, limit, used = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        # A limit holds for everything below it. In a container the mount may begin at our own group.
        inside = top / path.strip("/")
        for folder in (inside, *inside.parents):
            if folder != top and top not in folder.parents:
                break
            room = _room(folder, limit, used)
            if room is not None:
                rooms.append(room)
    return rooms


def _room(folder: Path, limit: str, used: str) -> int | None:
    try:
        bound = int((folder / limit).read_text())
        usage = int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # absent, or "max"
        return None
    # File pages not in use are given back before anything is refused.
    return max(bound - usage + int(stat.get("inactive_file", 0)), 0)
