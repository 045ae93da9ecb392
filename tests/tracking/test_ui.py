"""`modelyard ui`: the MLflow UI over a root's own store, opened in a real browser."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modelyard.errors import ResourceError, StorageError
from modelyard.tracking import Tracker, ui_command

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


_SERVE = "import sys; from modelyard.tracking import ui; sys.exit(ui(sys.argv[1], int(sys.argv[2])))"


@contextmanager
def running_ui(root: Path) -> Iterator[str]:
    """The UI of a root as `modelyard ui` runs it; ended by Ctrl-C, after which nothing of it may be left."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "platform")}
    with (root / "ui.log").open("wb") as log:
        command = [sys.executable, "-c", _SERVE, str(root), str(port)]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not answers(url):
            assert server.poll() is None, (root / "ui.log").read_text()[-2000:]
            assert time.monotonic() < deadline, (root / "ui.log").read_text()[-2000:]
            time.sleep(0.2)
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=60) == 0
    assert not answers(url), "the UI's processes outlive the command"


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2):
            return True
    except OSError:
        return False


def browse(url: str, folder: Path, *flags: str) -> str:
    """Opens a page in headless Chromium and returns what it printed."""
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000", "--virtual-time-budget=30000", *flags, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env={**os.environ, "HOME": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def distinct_rows(png: Path) -> int:
    """How many different rows of pixels (as filtered in the file) an image has: 1 or 2 when it is blank."""
    data, offset, body, width, depth = png.read_bytes(), 8, b"", 0, 0
    while offset < len(data):
        size, kind = struct.unpack(">I4s", data[offset : offset + 8])
        chunk = data[offset + 8 : offset + 8 + size]
        if kind == b"IHDR":
            width, depth = struct.unpack(">I", chunk[:4])[0], {2: 3, 6: 4}[chunk[9]]
        body += chunk if kind == b"IDAT" else b""
        offset += size + 12
    pixels, stride = zlib.decompress(body), width * depth + 1
    return len({pixels[i : i + stride] for i in range(0, len(pixels), stride)})


@pytest.fixture
def tracked(root: Path) -> tuple[Path, str, str]:
    """A root with one recipe run: the folder, the experiment's id and the stage run's id."""
    with Tracker(str(root), "gallery") as tracker:
        parent = tracker.start_recipe({"seed": 7}, {}, "a" * 64)
        run = tracker.start_stage(parent, "base", "pretrain", {"optimizer": {"learning_rate": 3e-4}}, {}, "b" * 64)
        for step in range(200):
            run.log_metrics({"loss": 9.0 / (1 + step / 20), "tokens_per_second": 900.0}, step=step)
        run.end()
        parent.end()
    from modelyard.tracking.store import connect

    assert run.id is not None
    return root, str(connect(tracker.store).get_run(run.id).info.experiment_id), run.id


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_the_page_of_a_run_renders_in_a_browser(tracked: tuple[Path, str, str], tmp_path: Path) -> None:
    root, experiment, run = tracked
    picture = Path(os.environ.get("MODELYARD_SCREENSHOTS", str(tmp_path))) / "mlflow-run.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    with running_ui(root) as url:
        page = f"{url}/#/experiments/{experiment}/runs/{run}?workflowType=machine_learning"
        text = browse(page, tmp_path, "--dump-dom")
        for expected in ("gallery", "base", "loss", "tokens_per_second", "optimizer.learning_rate", "0.0003"):
            assert expected in text, f"{expected!r} is not on the page"
        browse(page, tmp_path, f"--screenshot={picture}")
    assert distinct_rows(picture) > 100, f"the screenshot {picture} is blank"


def test_a_port_in_use_is_explained(root: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"port {port} cannot be used") as caught:
            ui_command(str(root), port)
    assert "--port" in caught.value.mend


def test_a_root_without_runs_is_explained(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nothing has been tracked"):
        ui_command(str(tmp_path), free_port())


def test_a_server_of_ones_own_needs_no_command(tmp_path: Path) -> None:
    found = ui_command(str(tmp_path), 5000, "http://mlflow.example:5000")
    assert (found.url, found.command) == ("http://mlflow.example:5000", ())


def test_the_command_binds_to_loopback_only(root: Path) -> None:
    command = ui_command(str(root), free_port()).command
    assert command[command.index("--host") + 1] == "127.0.0.1"
