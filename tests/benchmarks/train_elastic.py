"""Elastic training on two Ray nodes of this machine: one worker, a node comes, its notice of leaving, it leaves.

    python tests/benchmarks/train_elastic.py

`workers: [1, 2]` on a cluster of one node. Once it trains, a second node is added: Ray Train starts the group again
with two workers. Then that node is drained with a deadline, as a spot machine is (`ray drain-node`): a checkpoint must
be written before it goes. It is removed, and one worker trains to the end. `ours` is the largest difference of a step's
loss from one process that nobody disturbed; every step must be there once.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "train"), str(HERE.parent / "stages"), str(HERE.parent / "e2e")]
STEPS, EVERY, TARGET = 1000, 100, 1e-5
PACE_SECONDS = 0.05
# Looked at once a minute by default: too long for a run of minutes.
RESIZE_SECONDS = 5.0


def say(text: str) -> None:
    """Progress on standard error."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)


BEGAN = time.monotonic()


def paced(model: Any, batch: Any) -> Any:
    """The usual objective, but slow: steps must last longer than Ray takes to notice anything."""
    from modelyard.train.objective import causal_lm

    time.sleep(PACE_SECONDS)
    return causal_lm(model, batch)


def options() -> Any:
    """The stage's options; checkpoints are so far apart that one in between was asked for."""
    from training_parts import TINY

    from modelyard.stages.pretrain import PretrainOptions

    return PretrainOptions.model_validate(
        {
            "kind": "pretrain", "model": TINY.model_dump(), "steps": STEPS, "global_batch": 8, "micro_batch": 4,
            "learning_rate": 3e-3, "checkpoint_every": EVERY, "objective": "train_elastic:paced",
            "keep_checkpoints": 100, "async_checkpoints": False,
            "restarts": 5, "resources": {"workers": [1, 2]},
        }
    )  # fmt: skip


def checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are whole."""
    done = (folder / "work" / "checkpoints").glob("step-*/complete.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in done)


def wait(what: str, done: Any, seconds: float = 240) -> None:
    """Waits for a condition. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)
    say(what)


def disturb(cluster: Any, folder: Path, seen: dict[str, Any]) -> None:
    """Adds the second node, drains it, removes it; leaves in `seen` what was observed. In the main thread: Ray's nodes
    set signal handlers."""
    from two_nodes import NODE

    screen = folder / "screen.txt"

    def said(text: str) -> int:
        return screen.read_text().count(text) if screen.exists() else 0

    try:
        wait("one worker has written a checkpoint", lambda: checkpoints(folder))
        node = cluster.add_node(**NODE)
        wait("the group started again with the second node", lambda: said("resumed from") >= 1)
        grown = checkpoints(folder)[-1]
        wait("two workers have written a checkpoint", lambda: checkpoints(folder)[-1] > grown)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address, "--node-id",
            node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken back",
            "--deadline-remaining-seconds", "60",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        wait("the workers know", lambda: said("about to be taken away") >= 1)
        wait("a checkpoint in between", lambda: any(step % EVERY for step in checkpoints(folder)))
        seen["notice_step"] = next(step for step in checkpoints(folder) if step % EVERY)
        cluster.remove_node(node, allow_graceful=False)
        say("the node is gone")
    except Exception as error:
        seen["error"] = repr(error)


def undisturbed(tokens: Path, folder: Path) -> list[float]:
    """The losses of one process without Ray."""
    import torch
    from training_parts import pretraining

    from modelyard.train.programs import pretrain
    from modelyard.train.world import World

    job = pretraining(tokens, folder, steps=STEPS, checkpoint_every=STEPS, learning_rate=3e-3)
    return [row["loss"] for row in pretrain(job, World(0, 1, torch.device("cpu"))).history]


def main() -> None:
    """Prints the result as one JSON object."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        token = root / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "OMP_NUM_THREADS": "1"}
        # Workers import `paced` from here.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
        os.environ |= {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", "HF_HUB_OFFLINE": "1"}
        from training_parts import write_tokens

        tokens = write_tokens(root / "tokens")
        expected = undisturbed(tokens, root / "alone")
        say("the undisturbed run is done")
        print(json.dumps(measured(root, tokens, expected)))


def measured(root: Path, tokens: Path, expected: list[float]) -> dict[str, Any]:
    """Runs the disturbed training and compares."""
    from ray.cluster_utils import Cluster
    from training_stage import artifact, run_stage
    from two_nodes import DEATH, NODE

    from modelyard.stages import session, workers

    # No option of a recipe: people do not want a restart every few seconds.
    workers.RESIZE_SECONDS = RESIZE_SECONDS
    cluster = Cluster(initialize_head=True, head_node_args=NODE | {"_system_config": DEATH, "include_dashboard": False})
    folder, seen = root / "run", dict[str, Any]()
    try:
        os.environ["RAY_ADDRESS"] = cluster.address
        session.start(1, cluster.address)
        began = time.monotonic()
        inputs = {"tokens": artifact(tokens, "tokenize")}
        thread = threading.Thread(target=run_stage, args=(options(), inputs, folder))
        thread.start()
        disturb(cluster, folder, seen)
        thread.join()
        seconds = time.monotonic() - began
        session.stop()
    finally:
        cluster.shutdown()
    rows = (folder / "out" / "loss.csv").read_text().splitlines()
    column = rows[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in rows[1:]]
    screen = (folder / "screen.txt").read_text()
    apart = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    resumed = [int(step) for step in re.findall(r"resumed from step-(\d+)", screen)]
    good = apart <= TARGET and "error" not in seen and seen.get("notice_step") == resumed[-1]
    return {
        "name": "train_elastic", "unit": "nats", "ours": apart, "peer": 0.0, "peer_name": "one process, undisturbed",
        "ratio": 1.0, "target": TARGET, "pass": good, "resumed_at": resumed, **seen, "seconds": round(seconds, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
