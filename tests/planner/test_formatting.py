"""Quantities as people read them, and an import that stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

from modelyard.planner import formatting as fmt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (fmt.number(1.234e9), "1.23 B"), (fmt.number(999_950), "1 M"), (fmt.number(None), "-"), (fmt.number(12), "12"),
        (fmt.size(3.4 * 2**30), "3.4 GiB"), (fmt.size(512), "512 B"), (fmt.duration(7800), "2 h 10 min"),
        (fmt.duration(0.0123), "12.3 ms"), (fmt.duration(59), "59 s"), (fmt.duration(90), "1 min 30 s"),
        (fmt.duration(86400 * 3), "3 d"), (fmt.money(1234.5), "$1,234"), (fmt.money(0.0123), "$0.012"),
        (fmt.energy(0.0042), "4.2 Wh"), (fmt.energy(5300), "5.3 MWh"), (fmt.share(0.473), "47.3 %"),
        (fmt.mass(125_000), "125 t"), (fmt.mass(1.5), "1.5 kg"), (fmt.mass(0.0042), "4.2 g"),
        (fmt.number(1.2e26), "120 Y"),
        (fmt.flop(5.1e15), "5.1 PFLOP"), (fmt.flop(2e9), "2 GFLOP"),
    ],
)  # fmt: skip
def test_formats(text: str, expected: str) -> None:
    assert text == expected


def test_importing_loads_nothing_heavy() -> None:
    code = (
        "import sys, modelyard.planner.training, modelyard.planner.search, modelyard.planner.html\n"
        "assert not {'torch', 'ray', 'mlflow', 'transformers', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
