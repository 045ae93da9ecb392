"""Attention on a CPU by kernels of our own, where transformers would call PyTorch's.

An implementation of transformers' attention interface by the name of `NAME`. It computes what SDPA computes, within
float32 rounding, for whole sequences of which every position sees a run of positions up to its own: causal attention,
sliding windows, packed documents. Whatever else it is asked for goes to SDPA. It needs AVX-512.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, cast

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "modelyard_cpu"
_STARTS = "_modelyard_starts"
"""Where a mask keeps what `starts_of` found: all layers of a pass have the same."""


def use_kernels(model: nn.Module, device: torch.device) -> bool:
    """Makes a transformers model that attends by SDPA (also under an adapter) use the kernels; returns whether it does.

    Values stay those of SDPA where the kernels are not made for what is asked.
    """
    from modelyard.lanes import WIDE

    config = getattr(model, "config", None)
    if not WIDE or device.type != "cpu" or getattr(config, "_attn_implementation", None) != "sdpa":
        return False
    _register()
    cast(Any, model).set_attn_implementation(NAME)
    return True


@cache
def _register() -> None:
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """query [B, heads, L, D], key and value [B, shared heads, L, D] -> [B, L, heads, D]."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    starts = None
    fits = causal and dropout == 0.0 and _fits(query, key, value) and kwargs.get("position_bias") is None
    if fits and attention_mask is not None:
        starts = None if torch.compiler.is_compiling() else starts_of(attention_mask, query)
        fits = starts is not None
    if not fits:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return causal_attention(query, key, value, starts, scale)[0].transpose(1, 2), None


def _fits(*tensors: torch.Tensor) -> bool:
    query, key, value = tensors
    return (
        all(t.dtype == torch.float32 and t.device.type == "cpu" and t.stride(-1) == 1 for t in tensors)
        and query.shape[2] == key.shape[2] > 1
        and query.shape[1] % key.shape[1] == 0
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 16 == 0
        and not torch.is_autocast_enabled("cpu")
    )


def starts_of(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor | None:
    """The first position each one sees, int32 [B, L], of a bool mask [B or 1, 1, L, L]; None where some position does
    not see just a run of positions up to its own."""
    length = query.shape[2]
    if mask.dtype != torch.bool or mask.shape[1:] != (1, length, length):
        return None
    known: torch.Tensor | None = getattr(mask, _STARTS, None)
    if known is None:
        seen, place = mask[:, 0], torch.arange(length)
        first, last = (side.byte().argmax(-1) for side in (seen, seen.flip(-1)))
        run = (last == length - 1 - place) & (seen.sum(-1) == place - first + 1)
        known = first.int() if bool(run.all()) else torch.empty(0, dtype=torch.int32)
        setattr(mask, _STARTS, known)
    if not len(known):
        return None
    return known.expand(query.shape[0], length).contiguous()


@torch.library.custom_op("modelyard::causal_attention", mutates_args=())
def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor | None, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of float32 query [B, heads, L, D] over key and value [B, shared heads, L, D], D a multiple of 16.

    Position i sees those from starts[i] (int32 [B, L], at most i; None = 0) to i. Returns the result, [B, heads, L, D]
    with heads behind positions in memory, and the logarithms of the sums of exponentials [B, heads, L].
    """
    from modelyard.train.attention_kernels import forward

    out, sizes = _results(query)
    tensors = [_place(t) for t in (query, key, value, out)]
    _spread(forward, tensors, sizes, starts, query, key, scale)
    return out, sizes


causal_attention.register_fake(lambda query, *_: _results(query))


@torch.library.custom_op("modelyard::causal_attention_backward", mutates_args=())
def _backward(
    slope: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor | None,
    sizes: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from modelyard.train.attention_kernels import backward

    slope = slope if slope.stride(-1) == 1 else slope.contiguous()
    found = (_like(query, torch.empty), _like(key, torch.zeros), _like(value, torch.zeros))
    tensors = [_place(t) for t in (query, key, value, slope, *found)]
    _spread(backward, tensors, sizes, starts, query, key, scale)
    return found


_backward.register_fake(lambda _, *inputs: tuple(_like(x, torch.empty) for x in inputs[:3]))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, scale = inputs
    ctx.save_for_backward(query, key, value, starts, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.scale = scale


def _gradients(ctx: Any, slope: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, ...]:
    query, key, value, starts, sizes = ctx.saved_tensors
    return (*_backward(slope, query, key, value, starts, sizes, ctx.scale), None, None)


causal_attention.register_autograd(_gradients, setup_context=_keep)


def _like(x: torch.Tensor, make: Any) -> torch.Tensor:
    """A tensor of the shape of x [B, heads, L, D] with heads behind positions in memory, as projections make them."""
    b, heads, length, width = x.shape
    made: torch.Tensor = make(b, length, heads, width, dtype=x.dtype, device=x.device)
    return made.transpose(1, 2)


def _results(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(query, torch.empty), query.new_empty(query.shape[:3])


def _place(x: torch.Tensor) -> tuple[int, int, int, int]:
    """Address, and bytes from a position, a head, a sequence to the next."""
    return x.data_ptr(), x.stride(2) * 4, x.stride(1) * 4, x.stride(0) * 4


def _spread(
    kernel: Any,
    tensors: list[tuple[int, int, int, int]],
    sizes: torch.Tensor,
    starts: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    scale: float,
) -> None:
    """Runs all tasks of a kernel, on as many threads as PyTorch has."""
    (b, heads, length, width), shared = query.shape, key.shape[1]
    begins = 0 if starts is None else starts.data_ptr()
    rest = (heads, shared, length, width, scale)
    tasks, threads = b * shared, min(torch.get_num_threads(), b * shared)
    edges = [tasks * i // max(1, threads) for i in range(threads + 1)]

    def share(first: int, last: int) -> None:
        kernel(*tensors, sizes.data_ptr(), begins, first, last, *rest)

    if threads <= 1:
        share(0, tasks)
    else:
        list(_pool(threads).map(share, edges[:-1], edges[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="attention")
