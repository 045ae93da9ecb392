"""Matrix products of the decoder: several checkpoint matrices fused into one, in one of two precisions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine.options import Precision


class Linear:
    """`y = x W^T + b` where W is several checkpoint matrices stacked by rows.

    Stacking (query, key and value; gate and up) makes one product of three: on a CPU a small step is
    bound by dispatch, not by arithmetic. `float16_packed` keeps W as packed half precision (fbgemm).
    """

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        self.weight: Tensor | None = torch.empty(rows, columns)
        self.bias: Tensor | None = torch.zeros(rows) if bias else None
        self._packed: Any = None

    def set_rows(self, start: int, rows: Tensor, *, bias: bool) -> None:
        """Copies `rows` ([n, columns], or [n] for the bias) to rows `start ..`."""
        self._unpack()
        target = self.bias if bias else self.weight
        assert target is not None, "the caller checks that the layer has a bias"
        target[start : start + rows.shape[0]].copy_(rows)

    def pack(self, precision: Precision) -> None:
        """Brings the matrix into the form `precision` computes with; call after the last `set_rows`."""
        if precision == "float16_packed" and self._packed is None:
            self._packed = torch.ops.quantized.linear_prepack_fp16(self.weight, self.bias)
            self.weight = None

    def _unpack(self) -> None:
        if self._packed is not None:
            self.weight, self.bias = torch.ops.quantized.linear_unpack_fp16(self._packed)
            self._packed = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, self._packed)
            return y
        assert self.weight is not None
        return F.linear(x, self.weight, self.bias)
