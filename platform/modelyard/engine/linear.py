"""Matrix products of the decoder: several checkpoint matrices fused into one, in one of four precisions."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modelyard.engine import kernels
from modelyard.engine.options import Precision

ROWS_HINT = 32
"""Rows a packed float32 matrix is laid out for. Measured: at 1 to 256 rows never slower than the unpacked product,
1.4x as fast at 32, 1.6x at 8."""

# The operators themselves: the wrapper around those that take packed weights looks at every argument in Python, which
# costs as much as a small product.
_LINEAR_FP16 = torch.ops.quantized.linear_dynamic_fp16.default._op
_LINEAR_INT8 = torch.ops.quantized.linear_dynamic.default._op
_LINEAR_BLOCKED = torch.ops.mkldnn._linear_pointwise.default._op

_NO_BIAS = np.empty(0, np.float32)


class Linear:
    """`y = x W^T + b` where W is several checkpoint matrices stacked by rows.

    Stacking (query, key and value; gate and up) makes one product of three: on a CPU a small step is
    bound by dispatch, not by arithmetic. `float32` keeps W in oneDNN's blocked layout, `float16_packed` as half
    precision (fbgemm, relative error 2e-4), `bfloat16` blocked, with x and y rounded to it (relative error 4e-3; on AMX
    twice to three times as fast from 8 rows on), `int8` as 8-bit integers with a scale a row, and x likewise.
    """

    def __init__(self, rows: int, columns: int, bias: bool) -> None:
        self.rows, self.columns = rows, columns
        self.weight: Tensor | None = torch.empty(rows, columns)
        self.bias: Tensor | None = torch.zeros(rows) if bias else None
        self._packed: Any = None
        self._precision: Precision = "float32"

    def set_rows(self, start: int, rows: Tensor, *, bias: bool) -> None:
        """Copies `rows` ([n, columns], or [n] for the bias) to rows `start ..`."""
        if bias:
            assert self.bias is not None, "the caller checks that the layer has a bias"
            self.bias[start : start + rows.shape[0]].copy_(rows)
            if self._precision != "float16_packed":
                return  # its packed form holds the bias
        self._unpack()
        if not bias:
            assert self.weight is not None
            self.weight[start : start + rows.shape[0]].copy_(rows)

    def pack(self, precision: Precision) -> None:
        """Brings the matrix into the form `precision` computes with; call after the last `set_rows`."""
        if self._packed is not None and precision == self._precision:
            return
        self._unpack()
        assert self.weight is not None
        self._precision = precision
        if precision == "float16_packed":
            self._packed = torch.ops.quantized.linear_prepack_fp16(self.weight, self.bias)
        elif precision == "int8":
            self._packed = _pack_int8(self.weight)
        elif torch._C._has_mkldnn:
            whole = self.weight.bfloat16() if precision == "bfloat16" else self.weight
            self._packed = torch.ops.mkldnn._reorder_linear_weight(whole, ROWS_HINT)
        else:
            return
        self.weight = None

    def dense(self) -> Tensor:
        """W as float32 [rows, columns], as exact as the packed form allows."""
        self._unpack()
        assert self.weight is not None
        return self.weight

    def _unpack(self) -> None:
        if self._packed is None:
            return
        if self._precision == "float16_packed":
            self.weight = torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
        elif self._precision == "int8":
            self.weight = torch.ops.quantized.linear_unpack(self._packed)[0].dequantize()
        else:
            self.weight = self._packed.to_dense().float()
        self._packed = None

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor
        if self._packed is None:
            assert self.weight is not None
            return F.linear(x, self.weight, self.bias)
        if self._precision == "float32":
            y = _LINEAR_BLOCKED(x, self._packed, self.bias, "none", [], "")
        elif self._precision == "float16_packed":
            y = _LINEAR_FP16(x, self._packed)
        elif self._precision == "bfloat16":
            y = _LINEAR_BLOCKED(x.bfloat16(), self._packed, None, "none", [], "").float()
            if self.bias is not None:
                y += self.bias
        else:
            y = self._int8(x)
        return y

    def _int8(self, x: Tensor) -> Tensor:
        """The library scales activations by the range of the whole tensor, so a row would depend on its mates.

        Rows are scaled to magnitude 1 first, and a guard row spans that range in every batch.
        """
        count = x.shape[0]
        scaled = torch.empty(count + 1, self.columns)
        scales = np.empty(count, np.float32)
        kernels.scale_rows(x.numpy(), scaled.numpy(), scales)
        # 7-bit activations: without VNNI two products of 8 bits overflow the 16 bits they are summed in.
        y: Tensor = _LINEAR_INT8(scaled, self._packed, True)
        bias = _NO_BIAS if self.bias is None else self.bias.numpy()
        kernels.multiply_rows(y.numpy(), scales, bias)
        return y[:count]


def _pack_int8(weight: Tensor) -> Any:
    scales = weight.abs().amax(dim=1).clamp(min=1e-12) / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated, their products are not
        whole = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(whole, None)
