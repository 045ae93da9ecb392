"""Matrix products of the decoder: several checkpoint matrices fused into one, in one of four precisions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine import products
from modelyard.engine.options import Precision
from modelyard.engine.products import Matrix

ROWS_HINT = 32
"""Rows a packed float32 matrix is laid out for. Measured: at 1 to 256 rows never slower than the unpacked product,
1.4x as fast at 32, 1.6x at 8."""

# The operator itself: the wrapper around it looks at every argument in Python.
_LINEAR_BLOCKED = torch.ops.mkldnn._linear_pointwise.default._op


class Linear:
    """`y = x W^T + b` where W is several checkpoint matrices stacked by rows.

    Stacking (query, key and value; gate and up) makes one product of three. `float32` keeps W in oneDNN's blocked
    layout; the others are our own (`products`), with sums in float32: `float16_packed` holds W in half precision
    (relative error 2e-4), `bfloat16` in that, and where the CPU has AMX rounds x to it too (relative error 2e-3, at 32
    rows three times as fast), `int8` in 8 bits with a scale a row, and x likewise where the CPU multiplies them (VNNI).
    """

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        self.rows, self.columns = rows, columns
        self.weight: Tensor | None = torch.empty(rows, columns)
        self.bias: Tensor | None = torch.zeros(rows) if bias else None
        self.packed: Matrix | Tensor | None = None
        self._precision: Precision = "float32"

    def set_rows(self, start: int, rows: Tensor, *, bias: bool) -> None:
        """Copies `rows` ([n, columns], or [n] for the bias) to rows `start ..`."""
        if bias:
            assert self.bias is not None, "the caller checks that the layer has a bias"
            self.bias[start : start + rows.shape[0]].copy_(rows)
            return
        self._unpack()
        assert self.weight is not None
        self.weight[start : start + rows.shape[0]].copy_(rows)

    def pack(self, precision: Precision) -> None:
        """Brings the matrix into the form `precision` computes with; call after the last `set_rows`."""
        if self.packed is not None and precision == self._precision:
            return
        self._unpack()
        assert self.weight is not None
        self._precision = precision
        if precision != "float32":
            self.packed = products.pack(self.weight, self.bias, precision)
        elif torch._C._has_mkldnn:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight, ROWS_HINT)
        else:
            return
        self.weight = None

    def dense(self) -> Tensor:
        """W as float32 [rows, columns], as exact as the packed form allows."""
        self._unpack()
        assert self.weight is not None
        return self.weight

    def _unpack(self) -> None:
        if self.packed is None:
            return
        self.weight = self.packed.dense() if isinstance(self.packed, Matrix) else self.packed.to_dense().float()
        self.packed = None

    def __call__(self, x: Tensor) -> Tensor:
        if isinstance(self.packed, Matrix):
            return products.multiply(self.packed, x)
        if self.packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        y: Tensor = _LINEAR_BLOCKED(x, self.packed, self.bias, "none", [], "")
        return y
