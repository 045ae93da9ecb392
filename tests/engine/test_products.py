"""Packed products against plain ones: every layout, every number of rows, every part of a matrix."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from marks import CPU

import modelyard
from modelyard.engine import EngineCore, EngineOptions, Request, Sampling, generate, products
from modelyard.engine.options import Precision

KINDS: list[tuple[str, int, float]] = [
    ("float16_packed", products.HALF, 1e-3),
    ("bfloat16", products.BFLOAT16, 8e-3),
    ("bfloat16", products.BFLOAT16_AMX, 1.2e-2),
    ("int8", products.INT8, 2e-2),
    ("int8", products.INT8_VNNI, 4e-2),
]
THERE = {products.BFLOAT16_AMX: products.has_amx(), products.INT8_VNNI: products.HAS_VNNI}


def packed(kind: int, weight: torch.Tensor, bias: torch.Tensor | None, precision: str) -> products.Matrix:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "kind_of", lambda _: kind)
        return products.pack(weight, bias, precision)


@pytest.mark.parametrize(("precision", "kind", "most"), KINDS)
@given(
    st.integers(1, 40), st.integers(1, 200), st.integers(1, 150), st.booleans(), st.floats(1e-3, 1e3), st.integers(0, 9)
)
@settings(max_examples=25, deadline=None)
def test_every_layout_multiplies(
    precision: str, kind: int, most: float, count: int, rows: int, columns: int, biased: bool, scale: float, seed: int
) -> None:
    if not THERE.get(kind, True):
        pytest.skip("not on this CPU")
    torch.manual_seed(seed)
    x, w, bias = torch.randn(count, columns) * scale, torch.randn(rows, columns), torch.randn(rows) if biased else None
    m = packed(kind, w, bias, precision)
    y = products.multiply(m, x)
    exact = torch.nn.functional.linear(x.double(), w.double(), None if bias is None else bias.double())
    size = x.double().norm(dim=1)[:, None] * w.double().norm(dim=1) + 1e-9
    assert ((y - exact).abs() / size).max() < most
    assert ((m.dense() - w).abs() / w.abs().amax(dim=1, keepdim=True)).max() < 8e-3
    alone = torch.cat([products.multiply(m, row[None]) for row in x])
    assert torch.equal(alone, y), "a row does not depend on its batch mates"


@pytest.mark.parametrize(("precision", "kind", "most"), KINDS)
def test_threads_share_a_product(precision: str, kind: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    if not THERE.get(kind, True):
        pytest.skip("not on this CPU")
    m = packed(kind, torch.randn(300, 100), None, precision)
    x = torch.randn(9, 100)
    whole = products.multiply(m, x)
    monkeypatch.setattr(products, "SHARED_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(products.multiply(m, x), whole)


@pytest.mark.parametrize(("precision", "kind", "most"), KINDS)
def test_what_is_not_finite_stays_visible(precision: str, kind: int, most: float) -> None:
    if not THERE.get(kind, True):
        pytest.skip("not on this CPU")
    m = packed(kind, torch.randn(70, 30), None, precision)
    x = torch.randn(4, 30)
    x.view(torch.int32)[1, 4] = -1  # a NaN that overflows where it is rounded like a number
    x[2, 7] = torch.inf
    y = products.multiply(m, x)
    assert not y[[1, 2]].isfinite().any()
    assert y[[0, 3]].isfinite().all()


@pytest.mark.skipif(not products.has_amx(), reason="without AMX nothing is fused")
@pytest.mark.parametrize("count", [1, 16, 17, 45, 300])
def test_a_feed_forward_network_in_one_piece(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(count)
    gate_up, down = torch.randn(2 * 96, 70) / 8, torch.randn(50, 96) / 10
    x = torch.randn(count, 70)
    up, low = (products.pack(m, None, "bfloat16") for m in (gate_up, down))
    y = products.feed_forward(up, low, x)
    assert y is not None
    gates, ups = products.multiply(up, x).split(96, dim=1)
    apart = products.multiply(low, torch.nn.functional.silu(gates) * ups)
    assert (y - apart).abs().max() < 2e-2 * apart.abs().max(), "bfloat16 rounds what differs in its last bit"
    assert (y - apart).norm() < 2e-3 * apart.norm()
    alone = products.feed_forward(up, low, x[-1:])
    assert alone is not None
    assert torch.equal(alone, y[-1:]), "a row does not depend on its batch mates"
    monkeypatch.setattr(products, "SHARED_WORK", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shared = products.feed_forward(up, low, x)
    assert shared is not None
    assert torch.equal(shared, y)
    assert products.feed_forward(products.pack(torch.randn(2 * 40, 70), None, "bfloat16"), low, x) is None


def test_many_rows_after_another_do_not_disturb_each_other() -> None:
    """Large buffers go back to the system when they are freed: one that is freed too early would end the process."""
    for precision in ("bfloat16", "int8", "float16_packed"):
        m = products.pack(torch.eye(512), None, precision)
        for count in (2048, 300, 4096):
            x = torch.randint(-127, 128, (count, 512)).float()
            x[:, 0] = 127.0
            assert torch.equal(products.multiply(m, x), x)


@CPU
@pytest.mark.parametrize("precision", ["float16_packed", "bfloat16", "int8"])
def test_a_step_in_one_call_computes_what_single_calls_do(
    tiny_model: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = EngineOptions(max_sequences=4, precision=precision, threads=1, max_loss_increase=9.0)
    core = EngineCore(tiny_model, options)
    asked = [
        Request(str(n), tuple(range(5, 5 + n)), Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=0))
        for n in (3, 30, 7, 1)
    ]
    answers = []
    for whole in (True, False):
        if not whole:
            monkeypatch.setattr(type(core.decoder), "_whole", lambda self, batch: None)
        answers.append([(o.output.tokens, o.output.logprobs) for o in generate(core, asked)])
    assert answers[0] == answers[1]


def test_kernels_are_compiled_again_when_any_of_their_sources_has_changed(tmp_path: Path) -> None:
    """`step.decode` has the tiles of another file in it; Numba alone would go on with those it took in once."""
    folder = tmp_path / "modelyard"
    shutil.copytree(Path(modelyard.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import numpy as np; from modelyard.engine import kernels, products, step\n"
        "row = np.ones((1, 4), np.float32); out = np.empty((1, 2), np.float32); kernels.gated_silu(row, out)\n"
        "print(sum(kernels.gated_silu.stats.cache_hits.values()))"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": path, "NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def hits() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert (hits(), hits()) == ("0", "1")
    with (folder / "engine" / "tiles.py").open("a") as file:
        file.write("# changed\n")
    assert hits() == "0"
