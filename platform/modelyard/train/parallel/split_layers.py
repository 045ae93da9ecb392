"""The layers that tensor parallelism puts in the place of plain ones, and which part of a whole tensor is theirs.

An adapter around such a layer (`split_adapters.py`) keeps whole tensors and asks the layer for its parts.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from modelyard.models.nf4 import Nf4Linear
from modelyard.train.parallel import exchange


def own(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """What this worker holds of a parameter that is split over the tensor axis."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _whole(parameter: torch.Tensor) -> torch.Tensor:
    # FSDP has put a layer of four bits, which is a group of its own, back into shards.
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


class SplitLayer:
    """What a split layer knows besides its parameters. These are the answers of one split by output features.

    Attributes:
        tensor_group: the workers that share the layer.
        sequence: whether its region leaves parts of the sequence.
        bare: an adapter around the layer calls `leave` itself, after its own change of the product.
    """

    tensor_group: dist.ProcessGroup
    sequence: bool
    bare: bool = False

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        """This worker's part of what has a row for each output feature."""
        return whole.chunk(dist.get_world_size(self.tensor_group))[dist.get_rank(self.tensor_group)]

    def columns(self, whole: torch.Tensor) -> torch.Tensor:
        """This worker's part of what has a column for each input feature."""
        return whole

    def added(self, part: torch.Tensor) -> torch.Tensor:
        """A number for each of `rows` from its terms over input features, without gradients."""
        return part

    def early_bias(self) -> torch.Tensor | None:
        """The bias that is in the product."""
        bias: torch.Tensor | None = self.bias  # type: ignore[attr-defined]
        return None if bias is None else own(bias)

    def late_bias(self) -> torch.Tensor | None:
        """The bias that is added when the product has been summed."""
        return None

    def summed(self, product: torch.Tensor) -> torch.Tensor:
        """What leaves the layer, but for its late bias."""
        return product

    def leave(self, product: torch.Tensor) -> torch.Tensor:
        """What leaves the layer."""
        out, bias = self.summed(product), self.late_bias()
        return out if bias is None else out + bias


class _SplitByInput(SplitLayer):
    """A sum over this worker's input features, added up over the group; the bias is whole and added once."""

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        return whole

    def columns(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(dist.get_world_size(self.tensor_group), -1)[dist.get_rank(self.tensor_group)]

    def added(self, part: torch.Tensor) -> torch.Tensor:
        total = part.detach().clone()
        dist.all_reduce(total, group=self.tensor_group)
        return total

    def early_bias(self) -> torch.Tensor | None:
        return None

    def late_bias(self) -> torch.Tensor | None:
        bias: torch.Tensor | None = self.bias  # type: ignore[attr-defined]
        return None if bias is None else _whole(bias)

    def summed(self, product: torch.Tensor) -> torch.Tensor:
        if self.sequence:
            return exchange.scatter_total(product, self.tensor_group, 1)
        return exchange.total(product, self.tensor_group)

    def _out(self, product: torch.Tensor) -> torch.Tensor:
        return product if self.bare else self.leave(product)


class ColumnLinear(SplitLayer, nn.Linear):
    """This worker's output features; `bias` is split with them."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, own(self.weight), own(self.bias))  # type: ignore[arg-type]


class RowLinear(_SplitByInput, nn.Linear):
    """This worker's input features."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._out(F.linear(input, own(self.weight)))  # type: ignore[arg-type]


class ColumnConv1D(SplitLayer, Conv1D):
    """As `ColumnLinear` for GPT-2's transposed layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, own(self.weight).t(), own(self.bias))  # type: ignore[union-attr]


class RowConv1D(_SplitByInput, Conv1D):
    """As `RowLinear` for GPT-2's transposed layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._out(F.linear(x, own(self.weight).t()))  # type: ignore[union-attr]


class FusedConv1D(SplitLayer, Conv1D):
    """GPT-2's query, key and value in one layer: stored whole, computed for this worker's heads.

    A split of the stored matrix would cut across the three; FSDP shards its storage instead. Gradients of other
    workers' columns are zero here, so they are summed over the tensor axis.
    """

    def rows(self, whole: torch.Tensor) -> torch.Tensor:
        n, rank = dist.get_world_size(self.tensor_group), dist.get_rank(self.tensor_group)
        return whole.reshape(3, n, -1, *whole.shape[1:])[:, rank].flatten(0, 1)

    def early_bias(self) -> torch.Tensor:
        return self.rows(self.bias)

    def matrix(self) -> torch.Tensor:
        """This worker's columns of the three, [in, own out]."""
        return self.rows(self.weight.t()).t()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.matrix().t(), self.early_bias())


class ColumnNf4(SplitLayer, Nf4Linear):
    """As `ColumnLinear` for a frozen matrix in four bits: stored whole, made anew for this worker's rows (`part`).

    FSDP shards the codes; over the tensor axis alone every worker keeps all four bits.
    """

    def early_bias(self) -> torch.Tensor | None:
        return None if self.bias is None else self.rows(_whole(self.bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product, bias = self.product(x), self.early_bias()
        return product if bias is None else product + bias.to(product.dtype)


class RowNf4(_SplitByInput, Nf4Linear):
    """As `RowLinear` for a frozen matrix in four bits, stored as that of `ColumnNf4`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._out(self.product(x))


class VocabularyEmbedding(SplitLayer, nn.Embedding):
    """This worker's rows of the vocabulary; tokens of other rows give zeros, and the group adds up."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        rows = own(self.weight)
        assert rows is not None
        at = input - rows.shape[0] * dist.get_rank(self.tensor_group)
        foreign = (at < 0) | (at >= rows.shape[0])
        found = F.embedding(at.masked_fill(foreign, 0), rows).masked_fill(foreign.unsqueeze(-1), 0.0)
        return exchange.total(found, self.tensor_group)


class VocabularyHead(SplitLayer, nn.Linear):
    """Logits of this worker's rows of the vocabulary, joined: every worker goes on with all logits."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        hidden = exchange.enter(input, self.tensor_group)
        logits = F.linear(hidden, own(self.weight), own(self.bias))  # type: ignore[arg-type]
        return exchange.join(logits, self.tensor_group, -1)


def split_class(layer: nn.Module, style: str) -> type[nn.Module] | None:
    """What `layer` becomes under a style of a tensor plan: colwise, rowwise or fused_colwise; None = it cannot."""
    by_output = style == "colwise"
    if isinstance(layer, Conv1D):
        return FusedConv1D if style == "fused_colwise" else ColumnConv1D if by_output else RowConv1D
    if isinstance(layer, Nf4Linear):
        return ColumnNf4 if by_output else RowNf4
    if type(layer) is nn.Linear:
        return ColumnLinear if by_output else RowLinear
    return None


def matrix_of(layer: SplitLayer) -> torch.Tensor:
    """This worker's part of the layer's matrix as [own out, own in]. Without gradients: adapted matrices are frozen."""
    if isinstance(layer, FusedConv1D):
        return layer.matrix().t().detach()
    weight = layer.weight  # type: ignore[attr-defined]
    local = weight.detach() if isinstance(layer, Nf4Linear) else own(weight).detach()  # type: ignore[union-attr]
    return local.t() if isinstance(layer, Conv1D) else local
