"""Kernels between the products against plain PyTorch: any width, any length, what is not finite."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from modelyard.engine import attention, kernels


def cached(tensor: torch.Tensor) -> np.ndarray:
    """As kernels take keys and values: bfloat16 as its bits."""
    bits: np.ndarray = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return bits


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize(
    ("width", "heads", "kv_heads", "most"),
    [(64, 8, 4, 97), (64, 3, 3, 16), (80, 6, 2, 33), (8, 4, 2, 40), (24, 5, 1, 17), (128, 5, 1, 300)],
)
def test_attention_over_exact_lengths(
    width: int, heads: int, kv_heads: int, most: int, window: int, kept: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths, slots = [most, most - 1, 5, 1], np.array([3, 2, 0, 1])
    qkv = torch.randn(4, heads + 2 * kv_heads, width)
    keys, values = (torch.randn(4, kv_heads, most, width).to(kept) for _ in range(2))
    out = np.full((4, heads, width), np.nan, np.float32)
    positions = np.array(lengths) - 1
    scale = width**-0.5
    attention.attend(qkv.numpy(), 0, 4, heads, positions, slots, cached(keys), cached(values), scale, window, out)
    for row, (end, slot) in enumerate(zip(lengths, slots, strict=True)):
        start = max(0, end - window) if window else 0
        k, v = (part[slot, :, start:end].double()[None] for part in (keys, values))
        exact = F.scaled_dot_product_attention(qkv[row, :heads, None].double()[None], k, v, enable_gqa=True)
        assert np.abs(out[row] - exact[0, :, 0].numpy()).max() < 2e-6


def test_attention_keeps_what_is_not_finite_to_its_row() -> None:
    qkv, keys, values = torch.randn(2, 3, 16), torch.randn(2, 1, 40, 16), torch.randn(2, 1, 40, 16)
    keys[0, 0, 20, 3] = torch.nan
    out = np.zeros((2, 1, 16), np.float32)
    attention.attend(
        qkv.numpy(), 0, 2, 1, np.array([39, 39]), np.array([0, 1]), keys.numpy(), values.numpy(), 0.25, 0, out
    )
    assert np.isnan(out[0]).all()
    assert np.isfinite(out[1]).all()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16])
def test_keys_and_values_are_kept_as_the_cache_rounds(kept: torch.dtype) -> None:
    qkv, no_turns, no_norm = torch.randn(2, 4, 18), np.empty((0, 0), np.float32), np.empty(0, np.float32)
    qkv[1, 3, 5], qkv[1, 3, 6] = torch.nan, torch.inf
    keys, values = torch.zeros(3, 1, 5, 18, dtype=kept), torch.zeros(3, 1, 5, 18, dtype=kept)
    kernels.rotate_and_store(
        qkv.numpy(), 2, np.array([4, 0]), np.array([1, 2]), no_turns, no_turns, no_norm, no_norm, 1e-5,
        cached(keys), cached(values),
    )  # fmt: skip
    for part, stored in ((2, keys), (3, values)):
        assert torch.equal(stored[[1, 2], 0, [4, 0]].nan_to_num(7.0), qkv[:, part].to(kept).nan_to_num(7.0))
        assert torch.count_nonzero(stored) == 36


@pytest.mark.parametrize("width", [1, 16, 37])
def test_gated_silu(width: int) -> None:
    both = torch.randn(3, 2 * width) * 30
    out = torch.empty(3, width)
    kernels.gated_silu(both.numpy(), out.numpy())
    exact = F.silu(both[:, :width].double()) * both[:, width:].double()
    assert ((out - exact).abs() <= 1e-6 * exact.abs() + 1e-30).all()


def test_the_largest_of_rows_is_the_first_and_nan_stays_one() -> None:
    rows = torch.randn(6, 1003)
    rows[1, 5] = rows[1, 77] = 9.0
    rows[2, 1002] = 50.0
    rows[3, 4] = torch.inf
    rows[4] = -torch.inf
    rows[5, 8] = torch.nan
    values, places = np.empty(6, np.float32), np.empty(6, np.int64)
    kernels.largest(rows.numpy(), values, places)
    best, exact = rows.max(dim=-1)
    assert np.array_equal(values, best.numpy(), equal_nan=True)
    assert places[:4].tolist() == [exact[0], 5, 1002, 4]
