"""Cross-entropy fused with the output layer, in chunks: the logits of a whole batch never exist.

The output layer and its loss need three products: logits z = h W^T, and for the gradients dh = dz W and dW = dz^T h
with dz = softmax(z) - onehot(label). All three are made for a few rows at a time in the forward pass, so a chunk of
logits is used up while it lies in the cache and then forgotten. The number of operations is that of the plain way
(nothing is recomputed); memory falls from rows x vocabulary several times over to one chunk. Rows without a label cost
nothing where labels are sparse. The same idea: Cut Your Losses (arXiv 2411.09009), Liger Kernel (arXiv 2410.10989).

Where tensor parallelism splits the vocabulary, each worker makes its own columns of a chunk, and three numbers a row
travel (Megatron, arXiv 1909.08053, section 3): the largest logit, the sum of exponentials, and the label's logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast
from weakref import WeakSet

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from modelyard.train.parallel import exchange

IGNORE = -100
"""A label that is not learnt, as in `torch.nn.functional.cross_entropy`."""

CHUNK_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Size of one chunk of fp32 logits. CPU: fits the last-level cache (256 rows of a vocabulary of 8,192 were fastest of
64 to 1,024); CUDA: enough rows to fill the device with one product."""

Softmax = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From a chunk of logits and its labels to the summed loss and the gradient of the logits."""

_plain_heads: WeakSet[nn.Module] = WeakSet()
"""Models found to do something between output layer and logits (a soft cap, a scale): they take the plain way."""


def language_loss(
    model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor, *, sparse: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Runs `model(**inputs)` and sums the cross-entropy of its logits, by the fused way where the model allows it.

    It does where the output layer is a plain `nn.Linear`, whole on this worker while the model runs (FSDP gathers
    it) or split by vocabulary, and its output is returned as it is.

    Args:
        model: anything with transformers' interface: `get_output_embeddings()`, and `.logits` in what it returns.
        inputs: what the model is called with.
        labels: int64 [B, L], aligned with the logits; `IGNORE` where nothing is learnt.
        sparse: whether many labels may be `IGNORE`; their rows are then left out (one synchronisation on CUDA).

    Returns:
        The summed loss in nats, fp32, and the number of labels as `weight`.
    """
    split: Callable[..., Any] | None = getattr(model, "language_loss", None)
    if split is not None:  # A layout that splits sequences or layers cuts inputs and labels itself.
        return cast(tuple[torch.Tensor, dict[str, torch.Tensor]], split(inputs, labels, sparse=sparse))
    head = output_layer(model)
    if head is not None and model not in _plain_heads:
        fused = _FusedHead(head, labels, sparse, bool(getattr(model, "compiled_loss", False)))
        with replaced(head, fused):
            logits = model(**inputs).logits
        if fused.loss is None:
            return summed_cross_entropy(logits, labels)
        if logits is fused.loss:
            return fused.loss, {"weight": (labels != IGNORE).sum()}
        _plain_heads.add(model)
    return summed_cross_entropy(model(**inputs).logits, labels)


def summed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Sum of cross-entropy in nats over labels that are not `IGNORE`, in fp32, and their number as the weight.

    `logits` [..., V], `labels` int64 [...].
    """
    flat = labels.reshape(-1)
    loss = F.cross_entropy(logits.reshape(flat.shape[0], -1).float(), flat, ignore_index=IGNORE, reduction="sum")
    return loss, {"weight": (flat != IGNORE).sum()}


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    sparse: bool = False,
    compiled: bool = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T + bias, labels)` in nats, a scalar fp32, without the logits.

    Products are taken in the type of `hidden` (autocast's where that is on), the softmax and the sum of the weight's
    gradient in fp32. Gradients are made in the forward pass; backward may run once.

    Args:
        hidden: [..., H].
        weight: [V, H].
        labels: int64 [...], `IGNORE` where nothing is learnt.
        bias: [V] or None.
        sparse: leave rows without a label out of the products.
        compiled: compile the softmax of a chunk with torch.compile.
        group: workers that hold equal shares of the vocabulary, in order; `weight` and `bias` are this one's, `hidden`
            and the result are the same on all. None = they are whole.
    """
    if group is not None:
        hidden = exchange.enter(hidden, group)
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    # Finding the rows costs a synchronisation on CUDA, and nothing on a CPU.
    dense = sparse or rows.device.type == "cpu"
    if dense:
        kept = (flat != IGNORE).nonzero().squeeze(1)
        rows, flat = rows[kept], flat[kept]
    softmax = _fused_softmax_loss if compiled else _softmax_loss
    how = partial(softmax, dense=dense) if group is None else partial(_split_softmax_loss, group=group)
    loss: torch.Tensor = _LinearCrossEntropy.apply(rows, weight, bias, flat, how)  # type: ignore[no-untyped-call]
    return loss


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer that makes logits where it is a plain `nn.Linear`, else None."""
    find: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = find() if find is not None else None
    # Exactly Linear, or FSDP's subclass of it: an adapter or a quantised layer computes something else.
    plain = isinstance(head, nn.Linear) and (type(head).forward is nn.Linear.forward or split_over(head) is not None)
    return head if plain else None


def split_over(head: nn.Module) -> dist.ProcessGroup | None:
    """The workers an output layer's vocabulary is split over (`parallel.split_layers.VocabularyHead`)."""
    group: dist.ProcessGroup | None = getattr(head, "tensor_group", None)
    return group


def own_parts(head: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of an output layer, this worker's rows of them where the vocabulary is split."""
    split = split_over(head) is not None
    weight, bias = (p.to_local() if split and isinstance(p, DTensor) else p for p in (head.weight, head.bias))
    return weight, bias


def placed(labels: torch.Tensor, columns: int, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each label among this worker's `columns` of the vocabulary, [N, 1] and 0 where it is not there, and
    whether it is, bool [N]."""
    at = labels if group is None else labels - columns * dist.get_rank(group)
    here = (at >= 0) & (at < columns)
    return at.masked_fill(~here, 0).unsqueeze(1), here


class _FusedHead:
    """Stands in for the output layer's `forward` during one call of the model."""

    def __init__(self, head: nn.Linear, labels: torch.Tensor, sparse: bool, compiled: bool) -> None:
        self._head, self._labels, self._sparse, self._compiled = head, labels, sparse, compiled
        self.loss: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        group = split_over(self._head)
        if hidden.shape[:-1] != self._labels.shape:
            return type(self._head).forward(self._head, hidden)
        weight, bias = own_parts(self._head)
        if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
            return F.linear(hidden, weight, bias)
        self.loss = linear_cross_entropy(
            hidden, weight, self._labels, bias, sparse=self._sparse, compiled=self._compiled, group=group
        )
        return self.loss


@contextmanager
def replaced(head: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Puts `forward` in the place of the layer's own for a while."""
    # On the instance: hooks of the layer (FSDP's among them) still run around it.
    head.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del head.forward


class _LinearCrossEntropy(torch.autograd.Function):
    """`forward` makes loss and gradients chunk by chunk; `backward` hands the gradients out."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        softmax: Softmax,
    ) -> torch.Tensor:
        kind, given = hidden.device.type, (hidden.dtype, weight.dtype)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        wants = ctx.needs_input_grad
        with torch.autocast(kind, enabled=False):
            rows, matrix = hidden.to(dtype), weight.to(dtype)
            gradients = _Gradients(rows, matrix, wants)
            loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
            size = max(1, CHUNK_BYTES.get(kind, 256 << 20) // (4 * weight.shape[0]))
            for start in range(0, len(rows), size):
                part, wanted = rows[start : start + size], labels[start : start + size]
                logits = torch.mm(part, matrix.t()).float()
                if bias is not None:
                    logits += bias
                amount, slope = softmax(logits, wanted)
                loss += amount
                if any(wants):
                    gradients.add(start, part, slope)
        ctx.gradients, ctx.given = gradients, given
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        found: _Gradients = ctx.gradients
        ctx.gradients = None  # scaled in place: a second backward fails instead of returning something wrong
        hidden_type, weight_type = ctx.given
        hidden = None if found.hidden is None else found.hidden.mul_(scale).to(hidden_type)
        weight = None if found.weight is None else found.weight.mul_(scale).to(weight_type)
        bias = None if found.bias is None else found.bias.mul_(scale)
        return hidden, weight, bias, None, None


class _Gradients:
    """Buffers for the gradients that are wanted; the weight's is fp32."""

    def __init__(self, rows: torch.Tensor, matrix: torch.Tensor, wants: tuple[bool, ...]) -> None:
        self._matrix = matrix
        self.hidden = torch.empty_like(rows) if wants[0] else None
        self.weight = torch.zeros(matrix.shape, dtype=torch.float32, device=rows.device) if wants[1] else None
        self.bias = torch.zeros(len(matrix), dtype=torch.float32, device=rows.device) if wants[2] else None

    def add(self, start: int, rows: torch.Tensor, slope: torch.Tensor) -> None:
        """Takes in one chunk: its hidden states [C, H] and the gradient of its logits [C, V], fp32."""
        if self.bias is not None:
            self.bias += slope.sum(0)
        slope = slope.to(rows.dtype)
        if self.hidden is not None:
            torch.mm(slope, self._matrix, out=self.hidden[start : start + len(rows)])
        if self.weight is not None and rows.dtype == torch.float32:
            self.weight.addmm_(slope.t(), rows)
        elif self.weight is not None:
            self.weight += torch.mm(slope.t(), rows)


def _softmax_loss(logits: torch.Tensor, labels: torch.Tensor, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and the gradient of its logits [C, V]. `dense`: no label is `IGNORE`."""
    learnt = labels != IGNORE
    index = labels.masked_fill(~learnt, 0).unsqueeze(1)
    logs = torch.log_softmax(logits, dim=1)
    loss = -(logs.gather(1, index).squeeze(1) * learnt).sum()
    slope = logs.exp_()
    slope.scatter_add_(1, index, torch.full_like(index, -1, dtype=slope.dtype))
    return loss, slope if dense else slope.mul_(learnt.unsqueeze(1))


def _split_softmax_loss(
    logits: torch.Tensor, labels: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_softmax_loss` for this worker's columns [C, V / n]; the loss is that of all columns."""
    learnt, (index, here) = labels != IGNORE, placed(labels, logits.shape[1], group)
    peak = logits.amax(dim=1)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    slope = (logits - peak.unsqueeze(1)).exp_()
    mine = (logits.gather(1, index).squeeze(1) - peak) * here
    dist.all_reduce(both := torch.stack([slope.sum(dim=1), mine]), group=group)
    sums, wanted = both
    slope.div_(sums.unsqueeze(1)).scatter_add_(1, index, -here.to(slope.dtype).unsqueeze(1))
    return ((sums.log() - wanted) * learnt).sum(), slope.mul_(learnt.unsqueeze(1))


def _fused_softmax_loss(logits: torch.Tensor, labels: torch.Tensor, dense: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`_softmax_loss`, in the few passes that the compiler makes over a chunk.

    Labels are taken off outside: compared with every column, they would cost a third of it.
    """
    learnt = labels != IGNORE
    index = labels.masked_fill(~learnt, 0).unsqueeze(1)
    loss, slope = _compiled_softmax()(logits, index, learnt, dense)
    return loss, slope.scatter_add_(1, index, -learnt.to(slope.dtype).unsqueeze(1))


@cache
def _compiled_softmax() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return torch.compile(_likelihoods, dynamic=True)


def _likelihoods(
    logits: torch.Tensor, index: torch.Tensor, learnt: torch.Tensor, dense: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a chunk, and the softmax of its logits; zero in rows without a label, where there are any."""
    shifted = logits - logits.amax(dim=1, keepdim=True)
    weights = shifted.exp()
    total = weights.sum(dim=1, keepdim=True)
    loss = ((total.log() - shifted.gather(1, index)).squeeze(1) * learnt).sum()
    return loss, weights / total if dense else weights / total * learnt.unsqueeze(1)
