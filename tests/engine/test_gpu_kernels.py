"""The GPU kernels against the same operations in plain PyTorch: on a GPU, or interpreted on a CPU.

TRITON_INTERPRET=1 pytest tests/engine/test_gpu_kernels.py      # needs `pip install triton`
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modelyard.engine import paged_layout as reference
from modelyard.engine.request import Request
from modelyard.engine.scheduler import Piece, Sequence

pytest.importorskip("triton", reason="Triton is not installed")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
    pytest.skip("no GPU, and Triton is not asked to interpret", allow_module_level=True)

from modelyard.engine import gpu_kernels as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZE, BLOCKS = 16, 64


def pieces(shape: list[tuple[int, int]]) -> list[Piece]:
    """Pieces of (length, new tokens), with blocks that lie anywhere in the pool."""
    order, found, at = torch.randperm(BLOCKS).tolist(), [], 0
    for length, count in shape:
        needed = -(-length // SIZE)
        request = Request("a", tuple(range(length)))
        held = Sequence(request, 0, 0.0, list(range(length)), 0, 1, blocks=order[at : at + needed])
        found.append(Piece(held, length - count, count))
        at += needed
    return found


def laid_out(step: list[Piece], tile_rows: Callable[[int], int]) -> reference.Layout:
    staging = reference.Staging(DEVICE, SIZE, BLOCKS, 0, tile_rows)
    return staging.place(staging.pack(step))


def close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got, wanted, **({"rtol": 2e-5, "atol": 2e-5} if dtype == torch.float32 else
                                               {"rtol": 2e-2, "atol": 2e-2}))  # fmt: skip


DTYPES = [torch.float32, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float32]
STEPS = {
    "decode": [(200, 1), (1, 1), (17, 1)],
    "one long": [(900, 1)],
    "prompts": [(5, 5), (140, 140), (64, 64)],
    "mixed": [(200, 1), (130, 70), (33, 33), (16, 1)],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 64), (9, 3, 64), (4, 4, 24)])
@pytest.mark.parametrize("window", [0, 40])
@pytest.mark.parametrize("name", STEPS)
def test_attention(name: str, window: int, heads: int, kv_heads: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    step = pieces(STEPS[name])
    layout = laid_out(step, lambda most: kernels.tile_rows(heads // kv_heads, most))
    q = torch.randn(sum(p.count for p in step), heads, width, device=DEVICE, dtype=dtype)
    keys, values = torch.randn(2, BLOCKS * SIZE, kv_heads, width, device=DEVICE, dtype=dtype)
    wanted = reference.gathered(q.float(), keys.float(), values.float(), layout, SIZE, window)
    close(kernels.attend(q, keys, values, layout, SIZE, window).float(), wanted, dtype)


def test_few_tiles_are_split_over_their_keys() -> None:
    assert kernels.splits(1, 3, 4096, torch.device("cpu")) > 1
    assert kernels.splits(1, 3, 100, torch.device("cpu")) == kernels.splits(512, 8, 4096, torch.device("cpu")) == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("width", [64, 24])
def test_rotating_and_storing(width: int, normed: bool, rotated: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = laid_out(pieces(STEPS["mixed"]), lambda most: most)
    rows, heads, kv_heads = len(layout.tokens), 6, 2
    qkv = torch.randn(rows, heads + 2 * kv_heads, width, device=DEVICE, dtype=dtype)
    angles = torch.rand(256, width // 2, device=DEVICE) * 6
    rotation = (angles.cos(), angles.sin()) if rotated else None
    norms = tuple(torch.rand(2, width, device=DEVICE, dtype=dtype) + 0.5) if normed else None
    pools = [torch.zeros(2, BLOCKS * SIZE, kv_heads, width, device=DEVICE, dtype=dtype) for _ in range(2)]
    got = kernels.rotate_and_store(qkv, layout, rotation, norms, 1e-5, *pools[0])  # type: ignore[arg-type]
    wanted = reference.rotate_and_store(qkv, layout, rotation, norms, 1e-5, *pools[1])  # type: ignore[arg-type]
    close(got, wanted, dtype)
    close(pools[0], pools[1], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("width", [576, 2048])
def test_adding_and_norming(width: int, adds: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, delta = torch.randn(2, 7, width, device=DEVICE, dtype=dtype)
    weight, other = torch.rand(width, device=DEVICE, dtype=dtype), x.clone()
    got = kernels.add_norm(x, delta if adds else None, weight, 1e-5)
    wanted = reference.add_norm(other, delta if adds else None, weight, 1e-5)
    close(got, wanted, dtype)
    assert torch.equal(x, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_silu(dtype: torch.dtype) -> None:
    up = torch.randn(5, 2 * 1536, device=DEVICE, dtype=dtype) * 4
    close(kernels.gated_silu(up), reference.gated_silu(up), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "window"), [("decode", 0), ("one long", 0), ("mixed", 40)])
def test_keys_and_values_as_fp8(name: str, window: int, dtype: torch.dtype) -> None:
    """What the kernels store and read is what the reference does.

    On a CPU with numbers that need no rounding: Triton's interpreter does not carry when it rounds to e4m3.
    """
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not compute with e4m3")
    torch.manual_seed(0)
    step = pieces(STEPS[name])
    layout, width, heads, kv_heads = laid_out(step, lambda most: kernels.tile_rows(3, most)), 64, 6, 2
    everything = laid_out([Piece(p.sequence, 0, p.start + p.count) for p in step], lambda most: most)
    qkv = torch.randn(len(everything.tokens), heads + 2 * kv_heads, width, device=DEVICE)
    if DEVICE.type == "cpu":
        small, _ = reference.quantize(qkv)
        qkv = small.float() * 2.0 ** torch.randint(-9, -5, (*qkv.shape[:2], 1))
    held = []
    for module in (kernels, reference):
        pool = torch.zeros(2, BLOCKS * SIZE, kv_heads, width, device=DEVICE, dtype=torch.uint8).view(reference.FP8)
        scales = torch.zeros(2, BLOCKS * SIZE, kv_heads, device=DEVICE)
        module.rotate_and_store(qkv.to(dtype), everything, None, None, 1e-5, *pool, tuple(scales))  # type: ignore[attr-defined]
        held.append((pool, scales))
    close(held[0][1], held[1][1], dtype)
    other = held[0][0].view(torch.uint8) != held[1][0].view(torch.uint8)
    assert other.float().mean() <= (0.0 if DEVICE.type == "cpu" else 1e-3), "a GPU divides to the last bit but one"
    q = torch.randn(sum(p.count for p in step), heads, width, device=DEVICE, dtype=dtype)
    pool, scales = held[1]
    got = kernels.attend(q, *pool, layout, SIZE, window, tuple(scales))
    close(got, reference.gathered(q, *pool, layout, SIZE, window, tuple(scales)), dtype)
