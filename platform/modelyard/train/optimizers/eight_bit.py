"""Adam with 8-bit moments, by torchao (Dettmers et al. 2021, arXiv 2110.02861). Needs the extra `torchao`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from modelyard.errors import ResourceError


def adamw_8bit(params: Iterable[Any], **settings: Any) -> torch.optim.Optimizer:
    """torchao's `AdamW8bit`: moments in blocks of 256 with one fp32 scale each, 2 bytes a parameter instead of 8.

    Raises:
        ResourceError: torchao is not installed.
    """
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ResourceError(
            "8-bit Adam needs torchao, which is not installed",
            place="optimizer",
            mend="pip install 'modelyard[torchao]', or use optimizer: adamw",
        ) from error
    optimizer: torch.optim.Optimizer = AdamW8bit(params, **settings)
    return optimizer
