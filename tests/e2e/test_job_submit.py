"""`ray job submit --working-dir .` against a real head with token authentication, as a person would type it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Head:
    """A running head: its dashboard, and the environment that may talk to it."""

    address: str
    env: dict[str, str]
    folder: Path

    def submit(self, *words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of the checkout; returns when the job has ended."""
        command = [str(BIN / "ray"), "job", "submit", "--address", self.address, "--working-dir", ".", "--", *words]
        return subprocess.run(
            command, cwd=CHECKOUT, env=env or self.env, capture_output=True, text=True, timeout=240, check=False
        )


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, all different."""
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports


def end(head: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends the head and all it started, by process id: its descendants, and orphans that name its folder."""
    ours = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
    head.kill()
    head.wait()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            ours.append(process)
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=10)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    from modelyard.stages import session

    session.stop()  # the shared local Ray would only take memory meanwhile
    # Unix sockets live below the temp folder and their paths may have 107 bytes: keep it short.
    folder = Path(tempfile.mkdtemp(prefix="yard-", dir="/tmp"))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    (folder / "home").mkdir()
    env = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHONPATH"))} | {
        "HOME": str(folder / "home"),
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    dashboard, client, agent = free_ports(3)
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000",
        "--node-ip-address=127.0.0.1", "--port=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", "--metrics-export-port=0",
        f"--temp-dir={folder / 'ray'}",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        bearer = {"Authorization": f"Bearer {token.read_text()}"}
        wait_until_up(f"{address}/api/version", bearer, process, folder / "head.log")
        yield Head(address, env, folder)
    finally:
        end(process, folder)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_up(url: str, headers: dict[str, str], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url, headers=headers, timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the head did not come up:\n{log.read_text()}")


def test_driver_and_workers_have_the_standard_platform_and_the_uploaded_package(head: Head) -> None:
    done = head.submit("python", "tests/e2e/probe_job.py")
    found = re.search(r"PROBE (\{.*\})", done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert found, done.stdout
    standard = sysconfig.get_paths()["stdlib"]
    for side, places in json.loads(found.group(1)).items():
        assert places["platform"] == str(Path(standard) / "platform.py"), side
        assert places["system"] == "Linux"
        # Neither the checkout nor the installed package: the copy that came with the job.
        assert "_ray_pkg_" in places["modelyard"], side
        assert not places["modelyard"].startswith(str(CHECKOUT)), side


def test_without_the_token_the_cluster_takes_no_job(head: Head) -> None:
    assert httpx.get(f"{head.address}/api/jobs/", timeout=10).status_code == 401
    stranger = {key: value for key, value in head.env.items() if not key.startswith("RAY_AUTH")}
    done = head.submit("python", "-c", "print('let in')", env=stranger | {"RAY_AUTH_MODE": "disabled"})
    assert done.returncode != 0
    assert "let in" not in done.stdout


RECIPE = """
name: tiny
root: {root}
stages:
  corpus:
    kind: curate
    inputs: {{files: ["{folder}/*.txt"]}}
    steps: [{{normalize: {{}}}}, {{dedup: {{method: exact}}}}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.txt").write_text(f"Document {i // 2} says something that another document says, too.\n" * 3)
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(root=tmp_path / "root", folder=folder))
    return path


def test_any_recipe_runs_as_a_job_and_the_second_submission_finds_it_done(head: Head, recipe: Path) -> None:
    first = head.submit("python", "jobs/run_recipe.py", str(recipe))
    assert first.returncode == 0, first.stdout + first.stderr
    (manifest,) = recipe.parent.glob("root/artifacts/corpus-*/manifest.json")
    counts = json.loads(manifest.read_text())["counts"]
    assert (counts["documents_in"], counts["documents"]) == (6, 3)
    written = manifest.stat().st_mtime_ns

    # The same through the command line's own submit and a script of one stage kind.
    command = [str(BIN / "modelyard"), "submit", str(recipe), "--address", head.address]
    second = subprocess.run(
        command, cwd=CHECKOUT, env=head.env, capture_output=True, text=True, timeout=240, check=False
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "done before" in second.stdout
    third = head.submit("python", "jobs/curate_corpus.py", str(recipe))
    assert third.returncode == 0, third.stdout + third.stderr
    assert manifest.stat().st_mtime_ns == written


OWN = """
from modelyard.stages import session
session.start(3)
import ray
print("CPUS", ray.cluster_resources()["CPU"])
"""


def test_a_cluster_that_runs_on_this_machine_is_not_joined_unasked(head: Head) -> None:
    env = head.env | {"RAY_TMPDIR": str(head.folder)}  # where `ray start` left its address for whoever gives none
    assert list((head.folder / "ray").glob("ray_current_cluster"))
    done = subprocess.run([sys.executable, "-c", OWN], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert "CPUS 3.0" in done.stdout


def test_a_mistake_in_the_recipe_ends_the_job_with_its_place(head: Head, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("steps:", "stepz:"))
    done = head.submit("python", "jobs/run_recipe.py", str(recipe))
    assert done.returncode != 0
    assert "did you mean 'steps'" in done.stdout
