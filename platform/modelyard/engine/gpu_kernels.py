"""What a decoder does between its matrix products on a GPU, in Triton: four kernels a layer.

Attention reads keys and values through block tables, so that a shared prefix is shared and nothing is gathered first.
One kernel serves prompts and single tokens: a tile holds consecutive queries of one sequence and all query heads that
share a key-value head, and runs over its keys with an online softmax (FlashAttention, arXiv:2205.14135). Where a step
has too few tiles for the GPU, each is split over its keys and joined afterwards (Flash-Decoding, Dao et al. 2023).

Triton comes with PyTorch for CUDA; `BUILT` says whether it is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of PyTorch
    BUILT = False
else:
    BUILT = True

if TYPE_CHECKING:
    from modelyard.engine.paged_layout import Layout, Scales

jit: Any = triton.jit if BUILT else lambda kernel: kernel
LOG2_E = 1.4426950408889634
MOST_SPLITS = 16
TILE = 64
"""Rows of an attention tile for prompts: queries times the heads that share keys."""


@jit
def _attend(
    q, keys, values, out, part, tops, sums, tables, lengths, starts, owners, firsts,
    key_scales, value_scales, scale, table_stride, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = HEADS // KV_HEADS
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    owner, first = tl.load(owners + tile), tl.load(firsts + tile)
    start = tl.load(starts + owner)
    fresh = tl.load(starts + owner + 1) - start
    length = tl.load(lengths + owner)
    r, d = tl.arange(0, BLOCK), tl.arange(0, WIDE)
    row, head = first + r // GROUP, kv_head * GROUP + r % GROUP
    ok = (r < ROWS * GROUP) & (row < fresh)
    position = length - fresh + row
    wide = d < WIDTH
    address = ((start + row) * HEADS + head).to(tl.int64)
    x = tl.load(q + address[:, None] * WIDTH + d[None, :], mask=ok[:, None] & wide[None, :], other=0.0)
    end = tl.minimum(length - fresh + first + ROWS, length)  # what lies behind is in nobody's past
    begin = 0
    if WINDOWED:
        begin = tl.maximum(length - fresh + first - window + 1, 0) // KEYS * KEYS
    share = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
    low = begin + split * share
    high = tl.minimum(low + share, end)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, WIDE], tl.float32)
    for n0 in range(low, high, KEYS):
        n = n0 + tl.arange(0, KEYS)
        inside = n < high
        page = tl.load(tables + owner * table_stride + n // PAGE, mask=inside, other=0).to(tl.int64)
        held = (page * PAGE + n % PAGE) * KV_HEADS + kv_head
        place = held * WIDTH
        k = tl.load(keys + place[None, :] + d[:, None], mask=inside[None, :] & wide[:, None], other=0.0)
        s = tl.dot(x, k.to(x.dtype), input_precision=PRECISION) * scale
        if SCALED:
            s = s * tl.load(key_scales + held, mask=inside, other=0.0)[None, :]
        seen = inside[None, :] & (n[None, :] <= position[:, None])
        if WINDOWED:
            seen = seen & (n[None, :] > position[:, None] - window)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
        kept = tl.exp2(top - safe)
        p = tl.exp2(s - safe[:, None])
        v = tl.load(values + place[:, None] + d[None, :], mask=inside[:, None] & wide[None, :], other=0.0)
        total = total * kept + tl.sum(p, 1)
        if SCALED:
            p = p * tl.load(value_scales + held, mask=inside, other=0.0)[None, :]
        mixed = mixed * kept[:, None] + tl.dot(p.to(x.dtype), v.to(x.dtype), input_precision=PRECISION)
        top = new
    keep = ok[:, None] & wide[None, :]
    if SPLITS == 1:
        result = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + address[:, None] * WIDTH + d[None, :], result.to(out.dtype.element_ty), mask=keep)
    else:
        piece = address * SPLITS + split
        tl.store(part + piece[:, None] * WIDTH + d[None, :], mixed, mask=keep)
        tl.store(tops + piece, top, mask=ok)
        tl.store(sums + piece, total, mask=ok)


@jit
def _join(part, tops, sums, out, WIDTH: tl.constexpr, WIDE: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDE)
    wide = d < WIDTH
    top, total = tl.load(tops + row * SPLITS + s), tl.load(sums + row * SPLITS + s)
    weight = tl.exp2(top - tl.max(top, 0))
    mixed = tl.load(part + (row * SPLITS + s)[:, None] * WIDTH + d[None, :], mask=wide[None, :], other=0.0)
    result = tl.sum(mixed * weight[:, None], 0) / tl.sum(total * weight, 0)
    tl.store(out + row * WIDTH + d, result.to(out.dtype.element_ty), mask=wide)


@jit
def _rotate_and_store(
    qkv, positions, mapping, cos, sin, q_norm, k_norm, out, keys, values, key_scales, value_scales, epsilon,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr, ROTATED: tl.constexpr,
    NORMED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, WIDE)
    wide = d < HALF
    source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    kind = qkv.dtype.element_ty
    a = tl.load(source + d, mask=wide, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + d, mask=wide, other=0.0).to(tl.float32)
    place = tl.load(mapping + row).to(tl.int64) * KV_HEADS
    if head < HEADS + KV_HEADS:
        if NORMED:
            scale = tl.rsqrt((tl.sum(a * a, 0) + tl.sum(b * b, 0)) / (2 * HALF) + epsilon)
            norm = q_norm
            if head >= HEADS:
                norm = k_norm
            a = (a * scale).to(kind).to(tl.float32) * tl.load(norm + d, mask=wide, other=0.0).to(tl.float32)
            b = (b * scale).to(kind).to(tl.float32) * tl.load(norm + HALF + d, mask=wide, other=0.0).to(tl.float32)
        if ROTATED:
            at = tl.load(positions + row).to(tl.int64) * HALF + d
            c, s = tl.load(cos + at, mask=wide, other=0.0), tl.load(sin + at, mask=wide, other=0.0)
            turned = a * c - b * s
            b = b * c + a * s
            a = turned
    a, b = a.to(kind), b.to(kind)
    if head < HEADS:
        target = out + (row * HEADS + head) * 2 * HALF
        tl.store(target + d, a, mask=wide)
        tl.store(target + HALF + d, b, mask=wide)
    else:
        # Two pointers of one type: the pool's may differ from the queries'.
        held, scales, at = keys, key_scales, place + head - HEADS
        if head >= HEADS + KV_HEADS:
            held, scales, at = values, value_scales, place + head - HEADS - KV_HEADS
        x, y = a.to(tl.float32), b.to(tl.float32)
        if SCALED:
            step = tl.maximum(tl.maximum(tl.max(tl.abs(x), 0), tl.max(tl.abs(y), 0)), 1e-12) / 448.0
            tl.store(scales + at, step)
            x, y = x / step, y / step
        tl.store(held + at * 2 * HALF + d, x.to(held.dtype.element_ty), mask=wide)
        tl.store(held + at * 2 * HALF + HALF + d, y.to(held.dtype.element_ty), mask=wide)


@jit
def _add_norm(x, delta, weight, out, epsilon, WIDTH: tl.constexpr, WIDE: tl.constexpr, ADDS: tl.constexpr):
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
    wide = d < WIDTH
    kind = x.dtype.element_ty
    value = tl.load(x + row * WIDTH + d, mask=wide, other=0.0)
    if ADDS:
        value = (value + tl.load(delta + row * WIDTH + d, mask=wide, other=0.0)).to(kind)
        tl.store(x + row * WIDTH + d, value, mask=wide)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / WIDTH + epsilon)
    # Rounded before the weight, as transformers does.
    normed = (value * scale).to(kind).to(tl.float32) * tl.load(weight + d, mask=wide, other=0.0).to(tl.float32)
    tl.store(out + row * WIDTH + d, normed.to(kind), mask=wide)


@jit
def _gated_silu(up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = block * BLOCK + tl.arange(0, BLOCK)
    wide = d < WIDTH
    gate = tl.load(up + row * 2 * WIDTH + d, mask=wide, other=0.0).to(tl.float32)
    value = tl.load(up + row * 2 * WIDTH + WIDTH + d, mask=wide, other=0.0)
    silu = (gate / (1.0 + tl.exp(-gate))).to(value.dtype)
    tl.store(out + row * WIDTH + d, silu * value, mask=wide)


def tile_rows(group: int, most: int) -> int:
    """Queries of one attention tile, for `group` heads a key-value head and `most` new tokens of a sequence."""
    return 1 if most == 1 else max(1, TILE // group)


def splits(tiles: int, kv_heads: int, longest: int, device: torch.device) -> int:
    """Into how many parts the keys of a tile are split so that a step fills the GPU: a power of two."""
    units = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = min(2 * units // max(1, tiles * kv_heads), MOST_SPLITS, longest // 128)
    return 1 << max(0, wanted.bit_length() - 1)


def attend(
    q: Tensor, keys: Tensor, values: Tensor, layout: Layout, size: int, window: int, scales: Scales = None
) -> Tensor:
    """See `paged_layout.gathered`; nothing is gathered here, and the host waits for nothing."""
    _, heads, width = q.shape
    kv_heads, group = keys.shape[1], heads // keys.shape[1]
    rows, tiles = layout.tile, len(layout.owners)
    parts = splits(tiles, kv_heads, layout.longest, q.device)
    out = torch.empty_like(q)
    shape = (q.shape[0], heads, parts)
    part, tops, sums = (
        (q.new_empty(*shape, width, dtype=torch.float32), *q.new_empty(2, *shape, dtype=torch.float32))
        if parts > 1
        else (out, out, out)
    )
    block = max(16, triton.next_power_of_2(rows * group))
    wide = triton.next_power_of_2(width)
    _attend[(tiles, kv_heads, parts)](
        q, keys, values, out, part, tops, sums, layout.tables, layout.lengths, layout.starts, layout.owners,
        layout.firsts, *(scales or (q, q)), width**-0.5 * LOG2_E, layout.tables.stride(0), window,
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, WIDE=wide, ROWS=rows, BLOCK=block, KEYS=64, PAGE=size,
        SPLITS=parts, WINDOWED=bool(window), PRECISION="ieee", SCALED=scales is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        _join[(q.shape[0] * heads,)](part, tops, sums, out, WIDTH=width, WIDE=wide, SPLITS=parts)
    return out


def rotate_and_store(
    qkv: Tensor, layout: Layout, rotation: tuple[Tensor, Tensor] | None, norms: tuple[Tensor, Tensor] | None,
    epsilon: float, keys: Tensor, values: Tensor, scales: Scales = None,
) -> Tensor:  # fmt: skip
    """See `paged_layout.rotate_and_store`."""
    rows, every, width = qkv.shape
    kv_heads = keys.shape[1]
    heads = every - 2 * kv_heads
    out = qkv.new_empty(rows, heads, width)
    cos, sin = rotation or (qkv, qkv)
    q_norm, k_norm = norms or (qkv, qkv)
    _rotate_and_store[(rows, every)](
        qkv, layout.positions, layout.mapping, cos, sin, q_norm, k_norm, out, keys, values, *(scales or (qkv, qkv)),
        epsilon, HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, WIDE=triton.next_power_of_2(width // 2),
        ROTATED=rotation is not None, NORMED=norms is not None, SCALED=scales is not None, num_warps=1,
    )  # fmt: skip
    return out


def add_norm(x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
    """`x += delta`, in place; the RMS norm of x. [rows, hidden] each."""
    out = torch.empty_like(x)
    width = x.shape[1]
    wide = triton.next_power_of_2(width)
    _add_norm[(x.shape[0],)](
        x, x if delta is None else delta, weight, out, epsilon, WIDTH=width, WIDE=wide, ADDS=delta is not None,
        num_warps=min(16, max(1, wide // 512)),
    )  # fmt: skip
    return out


def gated_silu(up: Tensor) -> Tensor:
    """`silu(gate) * up` of [rows, 2 x width], gate first: [rows, width]."""
    width = up.shape[1] // 2
    out = up.new_empty(up.shape[0], width)
    block = min(1024, triton.next_power_of_2(width))
    _gated_silu[(up.shape[0], triton.cdiv(width, block))](up, out, WIDTH=width, BLOCK=block, num_warps=4)
    return out
