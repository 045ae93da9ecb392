"""What lies between the products of a decoder's blocks, in few passes over memory, with gradients by hand.

On a CPU an operation on activations costs the way to memory and back, not arithmetic, and autograd takes twice as many
such ways as a block needs. Here a norm keeps its input and one number a row; products of one input add up its gradient
inside (`products.py`); and queries and keys are rotated as complex numbers, for which rows of their matrices are put in
pairs: a copy of weights, not of activations, that leaves dot products as they are.

Values are those of transformers and PEFT within float32 rounding. Parameters stay where they are, so that checkpoints,
FSDP and PEFT see nothing of it. A module takes its own forward wherever this way was not made for: other devices and
types, autocast, `torch.compile` (which fuses by itself), layers that are split, quantized or hooked.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from modelyard.train.products import part_of, products

_made: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}
"""Classes made by :func:`_joined`, one a kind: two models of a kind have blocks of the same class."""


def fuse(model: nn.Module) -> None:
    """Gives modules of `model` that compute what Llama's do, and LoRA layers, the forward passes of this module.

    Not for selective recomputation: it keeps results of products, which are changed in place here.
    """
    for module in model.modules():
        kind = _kind(type(module))
        if kind is not None:
            module.__class__ = _joined(kind, type(module))


def _kind(given: type[nn.Module]) -> type[nn.Module] | None:
    """Which of the classes below takes the place of `given`."""
    if _same(given, llama.LlamaRMSNorm):
        return _Norm
    if _same(given, llama.LlamaMLP):
        return _Gated
    if any(_same(given, known) for known in (llama.LlamaAttention, MistralAttention, Qwen2Attention)):
        return _Attention
    adapted = given.__module__ == "peft.tuners.lora.layer" and given.__name__ == "Linear"
    return _Adapted if adapted else None


def _same(given: type[nn.Module], known: type[nn.Module]) -> bool:
    """Whether the forward passes are the same code: transformers repeats Llama's classes in most decoders' files."""
    codes = [getattr(kind.forward, "__code__", None) for kind in (given, known)]
    return None not in codes and len({(c.co_code, c.co_names, c.co_consts) for c in codes if c is not None}) == 1


def _joined(kind: type[nn.Module], given: type[nn.Module]) -> type[nn.Module]:
    if (kind, given) not in _made:
        # The name stays: transformers and PEFT look at it.
        _made[kind, given] = type(given.__name__, (kind, given), {"__module__": given.__module__})
    return _made[kind, given]


def _fits(x: torch.Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Norm(nn.Module):
    """RMS norm; `weight` [H] and `variance_epsilon` are transformers'."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight = cast(torch.Tensor, self.weight)
        if not _fits(hidden_states) or weight.dtype != torch.float32:
            return cast(torch.Tensor, super().forward(hidden_states))
        return cast(torch.Tensor, _RmsNorm.apply(hidden_states, weight, self.variance_epsilon))  # type: ignore[no-untyped-call]


class _Gated(nn.Module):
    """down(silu(gate(x)) * up(x)) of `gate_proj`, `up_proj`, `down_proj` and `act_fn`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layers = cast(Any, self)
        parts = [part for part in map(part_of, (layers.gate_proj, layers.up_proj)) if part is not None]
        silu = type(layers.act_fn).__name__ in ("SiLU", "SiLUActivation")
        if not _fits(x) or len(parts) < 2 or not silu:
            return cast(torch.Tensor, super().forward(x))
        gate, up = products(x, parts)
        return cast(torch.Tensor, layers.down_proj(_Swiglu.apply(gate, up)))  # type: ignore[no-untyped-call]


class _Attention(nn.Module):
    """Attention of Llama, Mistral, Qwen2 and their kin, by the interface that the configuration names."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        own = cast(Any, self)
        parts = [part for part in map(part_of, (own.q_proj, own.k_proj, own.v_proj)) if part is not None]
        angles, size = position_embeddings, own.head_dim
        whole = angles[0].shape[-1] == size and own.config._attn_implementation in AttentionInterface()
        if not _fits(hidden_states) or len(parts) < 3 or past_key_values is not None or not whole:
            result = super().forward(hidden_states, angles, attention_mask, past_key_values, **kwargs)
            return cast(tuple[torch.Tensor, torch.Tensor | None], result)
        heads = [part.weight.shape[0] // size for part in parts]
        query, key, value = products(hidden_states, parts, pairs=(*heads[:2], 0))
        turn = _turn(*angles)
        query, key = (_rotated(x, turn) for x in (query, key))
        value = value.view(*value.shape[:-1], -1, size).transpose(1, 2)
        attend = AttentionInterface()[own.config._attn_implementation]
        window = own.sliding_window if hasattr(own, "sliding_window") else getattr(own.config, "sliding_window", None)
        dropout = own.attention_dropout if self.training else 0.0
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=own.scaling,
            sliding_window=window,
            **kwargs,
        )
        return own.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


class _Adapted(nn.Module):
    """PEFT's LoRA layer."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        part = part_of(self) if _fits(x) and not args and not kwargs else None
        return products(x, [part])[0] if part is not None else cast(torch.Tensor, super().forward(x, *args, **kwargs))


def _turn(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotation as complex numbers [B, L, 1, half]; both halves of `cos` and `sin` [B, L, D] are the same."""
    half = cos.shape[-1] // 2
    return torch.complex(cos[..., :half], sin[..., :half]).unsqueeze(2)


def _rotated(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Pairs [B, L, heads * D] turned, as [B, heads, L, D]."""
    pairs = x.view(*x.shape[:-1], -1, turn.shape[-1], 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).transpose(1, 2)


class _RmsNorm(torch.autograd.Function):
    """y = x * r * w with r = (mean(x^2) + eps)^-1/2 (arXiv 1910.07467), over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        scale = size.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
        ctx.save_for_backward(rows, weight, scale)
        return cast(torch.Tensor, (rows * scale).mul_(weight).view(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        flat = slope.reshape(rows.shape)
        # dx = r (w dy - x r^2 mean(w dy x)); dw = sum of r x dy over rows, pairwise as torch sums.
        product = (flat * rows).mul_(scale)
        found = product.sum(0) if ctx.needs_input_grad[1] else None
        inner = torch.mv(product, weight).unsqueeze(1).mul_(scale.square()).div_(-rows.shape[1])
        torch.mul(flat, weight, out=product)
        return product.mul_(scale).addcmul_(rows, inner).view(slope.shape), found, None


class _Swiglu(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        active = F.silu(gate)
        ctx.save_for_backward(gate, up, active)
        return active * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up, active = ctx.saved_tensors
        inner = slope * up
        torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=inner)
        return inner, slope * active
