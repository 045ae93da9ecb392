"""The benchmark runner holds a benchmark to the contract of its last line."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"

GOOD = """
from contract import in_turns, report, say
say("working")
runs = in_turns({"ours": lambda: sum(range(1000)), "peer": lambda: sum(range(2000))}, repeats=3)
report("good", unit="MB/CPU s", ours=30.0, peer=12.0, peer_name="peer|1.0", target=2.0, curve=[[1, 2.34567]])
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    return load("run")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "contract.py").write_text((FOLDER / "contract.py").read_text())
    return tmp_path


def test_a_result_is_read_and_tabled(runner: ModuleType, folder: Path) -> None:
    (folder / "good.py").write_text(GOOD)
    assert runner.names(folder) == ["good"]
    result = runner.run_one("good", folder)
    assert (result["ratio"], result["pass"], result["curve"]) == (2.5, True, [[1, 2.346]])
    page = runner.table([result], ["bad ended with exit code 3"])
    row = next(line for line in page.splitlines() if line.startswith("| good"))
    assert "| 2.5 | >= 2 | yes |" in row
    assert "peer\\|1.0" in row
    assert "| bad | | | | | | | failed | bad ended with exit code 3 |" in page


def test_less_can_be_better(runner: ModuleType, folder: Path) -> None:
    (folder / "less.py").write_text(GOOD.replace("target=2.0", 'target=2.0, better="less"'))
    assert runner.run_one("less", folder)["pass"] is False


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("raise SystemExit(3)", "exit code 3"),
        ("print('done')", "not JSON"),
        ('print(\'{"name": "x"}\')', "lacks unit, ours"),
        ("", "exit code 0"),
    ],
)
def test_what_breaks_the_contract_is_named(runner: ModuleType, folder: Path, source: str, complaint: str) -> None:
    (folder / "bad.py").write_text(source)
    with pytest.raises(runner.Broken, match=complaint):
        runner.run_one("bad", folder)


def test_an_unknown_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), "nonsense"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "no benchmark 'nonsense'" in done.stderr


def test_cpu_seconds_cover_children_that_have_ended() -> None:
    contract = load("contract")
    burn = "t = 0\nfor i in range(6_000_000): t += i"
    with contract.clock() as spent:
        subprocess.run([sys.executable, "-c", burn], check=True)
    assert spent.cpu > 0.1
    assert json.dumps(spent.wall)


def test_peak_memory_covers_children() -> None:
    contract = load("contract")
    hold = "import time; held = b'x' * 150_000_000; time.sleep(0.5)"
    with contract.peak_memory() as peak:
        subprocess.run([sys.executable, "-c", hold], check=True)
    assert peak.mib > 140
