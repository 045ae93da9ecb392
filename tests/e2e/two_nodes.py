"""Deduplicates over a shuffle on two Ray nodes, one of which dies in it, and in one process on the one that is left.

    python tests/e2e/two_nodes.py RECIPE FOLDER

The last line is JSON: what the scratch folder held when the node died, and the files with checksums that
both executions published.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

DEATH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 1000, "health_check_failure_threshold": 8}
NODE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 120 * 2**20}


def scratch(root: Path) -> list[str]:
    """Files of unfinished stages: what a run has worked out and not yet published."""
    return [str(path.relative_to(root)) for path in (root / "work").rglob("*") if path.is_file()]


def tasks_on(node: Any) -> list[str]:
    """Names of what the node's workers compute now; Ray writes them into the processes' titles."""
    (raylet,) = node.all_processes["raylet"]
    titles = []
    for worker in psutil.Process(raylet.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            titles += worker.cmdline()[:1]
    return [title for title in titles if title.startswith("ray::") and ("Map" in title or "huffle" in title)]


def in_shuffle(files: list[str]) -> bool:
    """Whether the deduplication has begun: all units that have keys are done."""
    names = [Path(name) for name in files]
    keys, done = ({path.stem[-5:] for path in names if path.parent.name == name} for name in ("keys", "done"))
    return bool(keys) and keys == done


def kill_at_work(cluster: Any, node: Any, root: Path, seen: dict[str, Any]) -> None:
    """Waits until the shuffle has begun and the node computes for it, then takes the node away without notice."""
    deadline = time.monotonic() + 300
    files, tasks = scratch(root), tasks_on(node)
    while not (in_shuffle(files) and tasks) and time.monotonic() < deadline:
        time.sleep(0.02)
        files, tasks = scratch(root), tasks_on(node)
    seen |= {"scratch": files, "tasks": tasks}
    seen["published"] = [str(path) for path in root.glob("artifacts/*/manifest.json")]
    cluster.remove_node(node, allow_graceful=False)
    seen["removed"] = True


def published(outcome: Any) -> dict[str, list[list[str]]]:
    """Stage -> path and checksum of the files that hold data; reports carry times and are left out."""
    return {
        name: [[file.path, file.checksum] for file in artifact.manifest.files if not file.path.endswith(".html")]
        for name, artifact in outcome.artifacts.items()
    }


def two_nodes(tries: int = 3) -> tuple[Any, Any]:
    """A cluster and its second node; Ray gives a node thirty seconds to start, which a busy machine may exceed."""
    from ray.cluster_utils import Cluster

    head = NODE | {"_system_config": DEATH, "include_dashboard": False}
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args=head)
        doomed = cluster.add_node(**NODE)
        cluster.wait_for_nodes(timeout=120)
    except Exception:  # Ray raises a bare Exception
        if cluster is not None:
            cluster.shutdown()
        if tries == 1:
            raise
        return two_nodes(tries - 1)
    return cluster, doomed


def main(recipe: str, folder: Path) -> None:
    """Prints the comparison."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    import ray

    from modelyard import load, run
    from modelyard.stages import curate_shuffle, session

    curate_shuffle.PARTITION_BYTES = 400_000  # so that little text makes several partitions
    os.environ |= session.IDLE_WORKERS
    cluster, doomed = two_nodes()
    try:
        seen: dict[str, Any] = {}
        root = folder / "broken"
        killer = threading.Thread(target=kill_at_work, args=(cluster, doomed, root, seen), daemon=True)
        killer.start()
        broken = run(load(recipe, [f"root={root}", "corpus.shuffle_above=0"]), address=cluster.address)
        killer.join()
        whole = run(load(recipe, [f"root={folder / 'whole'}"]), address=cluster.address)
        ray.shutdown()
    finally:
        cluster.shutdown()
    print(json.dumps(seen | {"broken": published(broken), "whole": published(whole)}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
