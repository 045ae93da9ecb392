"""What backward needs from forward, layer by layer, counted tensor by tensor.

Counted as autograd saves them when a Hugging Face decoder runs eagerly: a norm keeps its input in fp32
and the normalised and scaled values; projections keep their inputs; fused attention keeps queries, keys,
values, its output and one log-sum a row and head; a gated FFN keeps both projections, the activation
and the product. Tensor parallelism divides the inner tensors; sequence parallelism the outer ones too
(Korthikanti et al., arXiv 2205.05198); context parallelism divides the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from modelyard.planner.architecture import Architecture, Layer
from modelyard.planner.flops import Recompute

Attention = Literal["flash", "eager"]
_ROWS_FP32 = 4
"""Row statistics and upcast norm inputs are kept in fp32."""


@dataclass(frozen=True)
class Cut:
    """How one worker's activations are cut: tensor and context degrees, and whether the outer tensors are split."""

    tensor: int = 1
    sequence_parallel: bool = True
    context: int = 1

    @property
    def outer(self) -> int:
        """Divisor of residuals and norms."""
        return self.tensor if self.sequence_parallel else 1


def layer_bytes(layer: Layer, tokens: float, sequence_length: int, width: int, cut: Cut, attention: Attention) -> float:
    """Bytes one layer keeps for backward.

    Args:
        layer: the layer.
        tokens: tokens in the micro-batch on this worker, context parallelism not yet applied.
        sequence_length: tokens a sequence, for eager attention's square.
        width: bytes a value of activations.
        cut: tensor, sequence and context parallelism.
        attention: `flash` (fused) or `eager` (keeps the probabilities).
    """
    tokens = tokens / cut.context
    t = cut.tensor
    kv = max(layer.kv_heads // t, 1) if layer.kv_heads >= t else 1
    heads = layer.heads / t
    blocks = 2 if layer.cross == 0 else 3
    norms = blocks * layer.hidden * (2 * width if layer.layer_norm else _ROWS_FP32 + 2 * width) / cut.outer
    query, value = heads * layer.head_dim, heads * layer.value_dim
    projected = query + kv * (layer.head_dim + layer.value_dim)
    scores = heads * _ROWS_FP32
    if attention == "eager":
        # Probabilities, and keys and values repeated for every query head.
        scores = heads * sequence_length * (width if width == 4 else width + _ROWS_FP32)
        projected += (heads - kv) * (layer.head_dim + layer.value_dim)
    attended = (projected + value) * width + scores
    if layer.qk_norm:
        attended += (query + kv * layer.head_dim) * (_ROWS_FP32 + width)
    attended *= 1 if layer.cross == 0 else 2
    return tokens * (norms + attended + _ffn_values(layer) / t * width)


_WRITTEN_OUT = {"gelu_new": 3, "gelu_fast": 3, "gelu_10": 2, "quick_gelu": 1}
"""Tensors of the FFN's width that an activation written out in operations keeps beyond a fused one's."""


def _ffn_values(layer: Layer) -> float:
    """Values a token keeps in the FFN.

    With a gate: both projections, the activation and the product. Without: the activation's input and
    output (ReLU keeps only its output).
    """
    kept = 4 if layer.matrices == 3 else 1 if layer.activation == "relu" else 2
    inner = layer.active_width * (kept + _WRITTEN_OUT.get(layer.activation, 0))
    if layer.experts == 1:
        return float(inner)
    # Routed tokens are copied to their experts and back before they are summed, and the router keeps its scores.
    return float(inner + 2 * layer.experts_active * layer.hidden + 3 * layer.experts)


def head_bytes(model: Architecture, tokens: float, cut: Cut, copies: float = 3.0) -> float:
    """Bytes at the loss: the log-softmax and the gradients on both sides of it, in fp32 (`copies` of the logits)."""
    return tokens / cut.context * model.vocab / cut.tensor * 4.0 * copies


def norm_bytes(hidden: int, tokens: float, width: int, cut: Cut, layer_norm: bool) -> float:
    """Bytes one norm keeps: its input and its output, and an RMS norm written out in operations one copy more."""
    kept = 2 * width if layer_norm else _ROWS_FP32 + 2 * width
    return tokens / cut.context * hidden * kept / cut.outer


def input_bytes(layer: Layer, tokens: float, width: int, cut: Cut) -> float:
    """Bytes of a layer's input, what full recomputation keeps."""
    return tokens / cut.context * layer.hidden * width / cut.outer


def kept_bytes(
    layer: Layer, tokens: float, sequence_length: int, width: int, cut: Cut, attention: Attention, recompute: Recompute
) -> float:
    """Bytes one layer keeps between its forward and its backward under a recomputation policy."""
    if recompute == "full":
        return input_bytes(layer, tokens, width, cut)
    # With fused attention the square never exists, so selective recomputation keeps what `flash` keeps.
    kind: Attention = "flash" if recompute == "selective" else attention
    return layer_bytes(layer, tokens, sequence_length, width, cut, kind)
