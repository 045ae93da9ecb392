"""FlexAttention (Dong et al. 2024, arXiv 2412.05496): masks of packed documents in blocks, empty ones skipped.

SDPA takes such a mask as a dense tensor and computes all of it. FlexAttention is compiled for each shape and runs on
CUDA; torch 2.13 has no backward of it on a CPU.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from modelyard.errors import RecipeError, ResourceError


def use_flex(model: nn.Module, device: torch.device) -> None:
    """Makes a transformers model (also under an adapter) attend by FlexAttention, in place.

    Raises:
        ResourceError: the worker computes on a CPU.
        RecipeError: the architecture has no such attention.
    """
    if device.type != "cuda":
        raise ResourceError(
            "flex attention trains on CUDA only, this worker has a CPU",
            place="attention",
            mend="use attention: sdpa, which computes the same",
        )
    try:
        cast(Any, model).set_attn_implementation("flex_attention")
    except (ValueError, ImportError) as error:
        raise RecipeError(
            f"the model cannot attend by flex attention: {str(error).splitlines()[0]}",
            place="attention",
            mend="use attention: sdpa",
        ) from error
