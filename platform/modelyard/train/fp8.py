"""Products in fp8, by torchao's float8 training (Micikevicius et al. 2022, arXiv 2209.05433). Needs extra `torchao`.

It runs on a GPU with fp8 units only; `tests/train/test_cuda.py` tests it there.
"""

from __future__ import annotations

import torch
from torch import nn

from modelyard.errors import ResourceError

_CAPABILITY = (8, 9)
"""Ada, Hopper and later have fp8 units."""


def to_fp8(blocks: list[nn.Module], device: torch.device) -> None:
    """Makes the linear layers inside `blocks` multiply in fp8, in place; weights stay what they are.

    The output layer, embeddings and layers whose sides are no multiples of 16 are left alone.

    Raises:
        ResourceError: the device has no fp8 units, or torchao is not installed.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < _CAPABILITY:
        have = "a CPU" if device.type != "cuda" else f"compute capability {capability[0]}.{capability[1]}"
        raise ResourceError(
            f"fp8 needs a GPU of compute capability 8.9 or higher, this worker has {have}",
            place="precision",
            mend="use precision: auto",
        )
    try:
        from torchao.float8 import convert_to_float8_training
    except ImportError as error:
        raise ResourceError(
            "fp8 needs torchao, which is not installed",
            place="precision",
            mend="pip install 'modelyard[torchao]', or use precision: bf16",
        ) from error

    def divides(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and not (module.in_features % 16 or module.out_features % 16)

    for block in blocks:
        convert_to_float8_training(block, module_filter_fn=divides)
