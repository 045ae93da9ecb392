"""Activation recomputation: a block's activations are dropped after forward and computed again in backward."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import modelyard.train.cpu_attention  # noqa: F401  defines an operator

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.modelyard.causal_attention.default,
}
"""Operators whose results selective recomputation keeps: dear to compute, one tensor each."""


def recompute(block: nn.Module, kind: str) -> None:
    """Makes `block` recompute its activations in training, in place. Parameter names stay as they are.

    Args:
        block: one transformer block.
        kind: `full` keeps only the block's input; `selective` also the results of matrix products and attention, so
            that norms, activations and rotations alone are computed twice (Korthikanti et al., arXiv 2205.05198).
    """
    forward = block.forward
    contexts: dict[str, Any] = {}
    if kind == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def again(*args: Any, **kwargs: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **contexts, **kwargs)

    # On the instance, inside `__call__`: hooks (FSDP's among them) run once around it.
    block.forward = again


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
