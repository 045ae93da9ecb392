"""Frozen matrices in four bits: NormalFloat with double quantization, as QLoRA has them (Dettmers et al. 2023,
arXiv 2305.14314, section 3).

A matrix is cut into blocks of 64 values in their order. A block is divided by its largest magnitude, and each value
becomes the nearest of 16 levels that are the quantiles of a normal distribution (appendix E). The magnitudes, less
their mean, are kept in 8 bits with one fp32 step for 256 of them: 4 + 8/64 + 32/(64 x 256) = 4.127 bits a parameter.
The 8 bits are integers: on the magnitudes of a normal matrix 0.14 % rms error against 0.42 % of the paper's floats.

Libraries for this exist and move: torchao took its NF4 out of `torchao.dtypes` in 0.18, and bitsandbytes brings
kernels of its own. The format is these hundred lines, and FSDP shards it like any parameter.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from modelyard.errors import RecipeError

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of the standard normal distribution, scaled to [-1, 1], with an exact zero (QLoRA, appendix E)."""
BLOCK, GROUP = 64, 256
"""Values that share a magnitude, and magnitudes that share a step (QLoRA, section 3)."""


class Nf4Linear(nn.Linear):
    """A linear layer whose matrix is frozen in four bits and made anew, in the input's type, for every product.

    `weight` is a plain tensor [out, in] in fp32, dequantized at each access; it is not a parameter. The state is
    `codes`, two values a byte, and `magnitudes`, frozen parameters that FSDP shards like others, and two small buffers.

    Attributes:
        part: dimension, number of equal parts along it, and which of them it multiplies by; None = the whole matrix.
    """

    part: tuple[int, int, int] | None = None

    def __init__(self, plain: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        codes, magnitudes, steps, mean = quantize(plain.weight.detach())
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.magnitudes = nn.Parameter(magnitudes, requires_grad=False)
        self.steps: torch.Tensor
        self.mean: torch.Tensor
        self.register_buffer("steps", steps)
        self.register_buffer("mean", mean)
        self.register_parameter("bias", plain.bias)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The matrix, or its part, as it multiplies, fp32 [out, in]; gathered where it is sharded, by all workers
        together."""
        return self._matrix(*(t.full_tensor() if isinstance(t, DTensor) else t for t in self._state()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out]."""
        product = self.product(x)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """As `forward`, without the bias."""
        return _Product.apply(x, self, *self._state())  # type: ignore[no-untyped-call, no-any-return]

    def _state(self) -> tuple[torch.Tensor, ...]:
        return self.codes.detach(), self.magnitudes.detach(), self.steps, self.mean

    def _matrix(self, *state: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        return dequantize(state, shape) if self.part is None else dequantize_part(state, shape, *self.part)


class _Product(torch.autograd.Function):
    """x W^T. The matrix is made again in backward: only its four bits are kept between the passes."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: Nf4Linear, *state: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        ctx.layer, ctx.given = layer, x.dtype
        ctx.save_for_backward(*state)
        return F.linear(x.to(dtype), layer._matrix(*state).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        matrix = ctx.layer._matrix(*ctx.saved_tensors).to(gradient.dtype)
        return (gradient @ matrix).to(ctx.given), *(None,) * 5


@torch.no_grad()
def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Any matrix -> codes uint8 [blocks, 32], magnitudes int8 [blocks], steps fp32 [groups], mean fp32 [1]."""
    flat = weight.float().reshape(-1)
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(dim=1)
    levels = torch.tensor(LEVELS, device=weight.device)
    scaled = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    nearest = torch.bucketize(scaled, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    # In double precision: another process, of other threads, makes the same codes of the same matrix.
    mean = largest.mean(dtype=torch.float64).float().reshape(1)
    apart = F.pad(largest - mean, (0, -len(largest) % GROUP)).reshape(-1, GROUP)
    steps = (apart.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    magnitudes = (apart / steps.unsqueeze(1)).round().to(torch.int8).reshape(-1)[: len(largest)]
    return nearest[:, ::2] << 4 | nearest[:, 1::2], magnitudes.contiguous(), steps, mean


def dequantize(state: tuple[torch.Tensor, ...], shape: tuple[int, int]) -> torch.Tensor:
    """The matrix of what :func:`quantize` gave, fp32 of `shape`."""
    values = _values(state[0], _largest(state))
    return values.reshape(-1)[: shape[0] * shape[1]].view(shape)


def dequantize_part(
    state: tuple[torch.Tensor, ...], shape: tuple[int, int], dim: int, parts: int, index: int
) -> torch.Tensor:
    """One of `parts` equal parts along `dim` of the matrix. Other blocks are left alone where blocks do not lie across
    the parts' borders."""
    width = shape[dim] // parts
    if (width * shape[1] if dim == 0 else width) % BLOCK or shape[1] % BLOCK:
        return dequantize(state, shape).narrow(dim, index * width, width)
    rows, across = (width, shape[1]) if dim == 0 else (shape[0], width)
    own = torch.arange(len(state[0]), device=state[0].device).view(shape[0], -1)
    own = own.narrow(dim, index * width // (1, BLOCK)[dim], width // (1, BLOCK)[dim]).reshape(-1)
    return _values(state[0][own], _largest(state)[own]).view(rows, across)


def _largest(state: tuple[torch.Tensor, ...]) -> torch.Tensor:
    _, magnitudes, steps, mean = state
    return magnitudes * steps.repeat_interleave(GROUP)[: len(magnitudes)] + mean


def _values(codes: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    # One look-up for two values: a table of 256 pairs.
    pairs = F.embedding(codes.reshape(-1).int(), _pairs(codes.device))
    return pairs.reshape(-1, BLOCK).mul_(largest.unsqueeze(1))


def _pairs(device: torch.device) -> torch.Tensor:
    levels = torch.tensor(LEVELS, device=device)
    return torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=1)


def quantize_matrices(model: nn.Module) -> None:
    """Puts the linear layers of the repeated blocks of `model` into four bits, in place.

    Embeddings, norms, the output layer and experts kept as one tensor of all stay as they are.

    Raises:
        RecipeError: there is no such layer.
    """
    stacks = [f"{name}." for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    chosen = [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith(tuple(stacks))]
    if not chosen:
        raise RecipeError(
            f"no layer of a {type(model).__name__} can be put into four bits: its blocks have no plain linear layers",
            place="adapter.lora.quantize",
            mend="leave quantize out",
        )
    for name, layer in chosen:
        _replace(model, name, Nf4Linear(layer))


def quantized_layers(model: nn.Module) -> list[tuple[str, Nf4Linear]]:
    """The layers of `model` in four bits, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Nf4Linear)]


def restore_matrices(model: nn.Module) -> None:
    """Turns every :class:`Nf4Linear` into a plain layer with the matrix it multiplies by, in place."""
    for name, layer in quantized_layers(model):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight, requires_grad=False)
        plain.bias = layer.bias
        _replace(model, name, plain)


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, layer)


def logical_sizes(model: nn.Module) -> dict[str, int]:
    """Values each parameter of `model` stands for, by name: those of a matrix in four bits count as the matrix's."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for name, layer in quantized_layers(model):
        sizes |= {f"{name}.codes": layer.in_features * layer.out_features, f"{name}.magnitudes": 0}
    return sizes
