"""Floating-point operations a token, and what utilisation means.

Definitions. *Model FLOPs* are what the mathematics of forward and backward needs: two operations for
each multiply-add, backward twice the forward, attention's products with every pair of positions of the
sequence (no discount for the causal half, as PaLM and Megatron-LM count) unless `attention="causal"`.
*Hardware FLOPs* add what activation recomputation repeats. MFU = model FLOP/s over the peak of the
devices; HFU = hardware FLOP/s over the same peak. With `6 N D` (Kaplan et al., arXiv 2001.08361, N
without embeddings) as the check: the two agree when the sequence is short against the width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from modelyard.errors import RecipeError
from modelyard.planner.architecture import Architecture, Layer, parse
from modelyard.planner.parameters import count

Recompute = Literal["none", "selective", "full"]
Counting = Literal["full", "causal"]


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token: products with weights, the head's, attention's, and what recomputation repeats."""

    weights: float
    head: float
    attention: float
    recomputed: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass."""
        return self.weights + self.head + self.attention

    @property
    def model(self) -> float:
        """Forward and backward: the numerator of MFU."""
        return 3 * self.forward

    @property
    def hardware(self) -> float:
        """Forward, backward and recomputation: the numerator of HFU."""
        return self.model + self.recomputed


def positions_seen(layer: Layer, sequence_length: int, counting: Counting) -> float:
    """How many positions one query looks at on average: the window at most, half when causal pairs count once."""
    if layer.window is not None and layer.window < sequence_length:
        w, s = layer.window, sequence_length
        return (w * (w + 1) / 2 + (s - w) * w) / s if counting == "causal" else float(w)
    return (sequence_length + 1) / 2 if layer.causal and counting == "causal" else float(sequence_length)


def _attention(layer: Layer, seen: float) -> float:
    """Scores and weighted values of one layer for one token that sees `seen` positions."""
    return 2 * seen * layer.heads * (layer.head_dim + layer.value_dim)


def flops_per_token(
    config: Mapping[str, Any] | Architecture, sequence_length: int, *, recompute: Recompute = "none",
    attention: Counting = "full", source_length: int | None = None,
) -> Flops:  # fmt: skip
    """FLOPs of one token of training on sequences of `sequence_length`.

    Only the experts a token is routed to count. For an encoder-decoder the token is a target token and
    the encoder's work on `source_length` tokens (the target's length when not given) is spread over it.
    For a ViT the token is a patch and `sequence_length` the patches and the class token.

    Args:
        config: Hugging Face config or its `Architecture`.
        sequence_length: tokens a sequence.
        recompute: `none`; `selective` (attention's products are repeated, arXiv 2205.05198); `full`
            (every layer's forward is repeated).
        attention: `full` counts every pair of positions, `causal` those a causal mask leaves.
        source_length: encoder tokens a sequence.

    Raises:
        RecipeError: bad config, or a sequence length below 1.
    """
    if sequence_length < 1:
        raise RecipeError(f"sequence_length is {sequence_length}", mend="use 1 or more tokens")
    a = config if isinstance(config, Architecture) else parse(config)
    source = source_length or sequence_length
    share = source / sequence_length
    weights = sum(2.0 * x.count * (x.active - x.norm) for x in a.layers)
    weights += sum(2.0 * x.count * (x.active - x.norm) * share for x in a.encoder)
    scores = sum(x.count * _attention(x, positions_seen(x, sequence_length, attention)) for x in a.layers)
    scores += sum(x.count * _attention(x, positions_seen(x, source, attention)) * share for x in a.encoder)
    scores += sum(x.count * _attention(x, source) for x in a.layers if x.cross)
    patches = 2.0 * a.embedding if a.patches else 0.0
    head = 0.0 if a.patches else 2.0 * a.embedding
    repeated = {"none": 0.0, "selective": scores, "full": weights + scores}
    if recompute not in repeated:
        raise RecipeError(f"unknown recompute {recompute!r}", mend="use none, selective or full")
    return Flops(weights=weights + patches, head=head, attention=scores, recomputed=repeated[recompute])


def six_n_d(config: Mapping[str, Any] | Architecture, tokens: float) -> float:
    """6 N D with N = parameters a token uses, without the embedding tables: the rule of thumb."""
    a = config if isinstance(config, Architecture) else parse(config)
    p = count(a)
    return 6.0 * (p.active - p.embedding - p.positions - (0 if a.tied else p.head)) * tokens


def mfu(tokens_per_second: float, per_token: Flops, peak_flops: float) -> float:
    """Model FLOPs utilisation, 0..1: `tokens_per_second` over all devices, `peak_flops` of all devices."""
    return tokens_per_second * per_token.model / peak_flops


def hfu(tokens_per_second: float, per_token: Flops, peak_flops: float) -> float:
    """Hardware FLOPs utilisation, 0..1: like `mfu`, with recomputed work counted."""
    return tokens_per_second * per_token.hardware / peak_flops
