"""Log-probabilities of given tokens with a gradient, fused with the output layer: no logits of a whole batch.

The loss of alignment is a function of log-probabilities that is only known afterwards, so that the gradient of a
chunk of logits cannot be made in the forward pass as `train.head` does. It is made in backward from logits computed
again: one more product with the output layer, in exchange for rows x vocabulary of memory several times over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from modelyard.train.head import CHUNK_BYTES, IGNORE, output_layer, own_parts, placed, replaced, split_over
from modelyard.train.parallel import exchange


@dataclass(frozen=True)
class TokenScores:
    """Of every position the label's log-probability (0 where nothing is learnt), the distribution's entropy in nats
    (without a gradient), and, where the model has a value head and it is asked for, the value; all fp32 [B, L]."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    values: torch.Tensor | None = None


def token_scores(
    model: nn.Module, inputs: Mapping[str, Any], labels: torch.Tensor, temperature: float = 1.0, values: bool = False
) -> TokenScores:
    """Runs `model(**inputs)` and scores `labels` [B, L] (`IGNORE` where nothing is learnt), aligned with the logits.

    `temperature` divides the logits; `values` asks the model's value head (`model.value_head`) too.
    """
    head, critic = output_layer(model), cast(Any, model).value_head if values else None
    if head is not None:
        fused = _FusedScores(head, labels, temperature, critic)
        with replaced(head, fused):
            result = model(**inputs).logits
        if fused.scores is not None and result is fused.marker:
            return fused.scores
    output = model(**inputs, output_hidden_states=True) if values else model(**inputs)
    rows = output.logits.reshape(-1, output.logits.shape[-1])
    kept = (labels.reshape(-1) != IGNORE).nonzero().squeeze(1)
    logs = F.log_softmax(rows[kept].float() / temperature, dim=1)
    found = [logs.gather(1, labels.reshape(-1)[kept].unsqueeze(1)).squeeze(1), _entropy(logs.detach())]
    if critic is not None:
        hidden = output.hidden_states[-1]
        found.append(critic(hidden.reshape(-1, hidden.shape[-1])[kept]))
    return _spread(found, kept, labels)


def _spread(found: Sequence[torch.Tensor], kept: torch.Tensor, labels: torch.Tensor) -> TokenScores:
    empty = torch.zeros(labels.numel(), dtype=torch.float32, device=found[0].device)
    return TokenScores(*(empty.index_put((kept,), part).view(labels.shape) for part in found))


def _entropy(logs: torch.Tensor) -> torch.Tensor:
    return -(logs.exp() * logs).sum(dim=1)


class _FusedScores:
    """Stands in for the output layer's `forward` during one call of the model."""

    def __init__(self, head: nn.Linear, labels: torch.Tensor, temperature: float, critic: nn.Module | None) -> None:
        self._head, self._labels, self._temperature, self._critic = head, labels, temperature, critic
        self.scores: TokenScores | None = None
        self.marker: torch.Tensor | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        group = split_over(self._head)
        if hidden.shape[:-1] != self._labels.shape:
            return type(self._head).forward(self._head, hidden)
        weight, bias = own_parts(self._head)
        if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
            return F.linear(hidden, weight, bias)
        flat = self._labels.reshape(-1)
        kept = (flat != IGNORE).nonzero().squeeze(1)
        rows = hidden.reshape(-1, hidden.shape[-1])[kept]
        mine = rows if group is None else exchange.enter(rows, group)
        found, entropy = _LinearScores.apply(mine, weight, bias, flat[kept], self._temperature, group)  # type: ignore[no-untyped-call]
        # Inside the model's forward, where a sharded value head is whole.
        values = () if self._critic is None else (self._critic(rows),)
        self.scores = _spread((found, entropy, *values), kept, self._labels)
        # Depends on the scores, so that hooks around the model (FSDP's) see a result with a gradient.
        self.marker = self.scores.logprobs
        return self.marker


class _LinearScores(torch.autograd.Function):
    """log_softmax(rows W^T + b)[label] by chunks; the gradient recomputes them.

    With a `group`, W and b are this worker's part of the vocabulary, results are the same on all, and gradients of
    `rows` are terms.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        found = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        entropy = torch.empty_like(found)
        ctx.size = max(1, CHUNK_BYTES.get(kind, 256 << 20) // (4 * weight.shape[0]))
        with torch.autocast(kind, enabled=False):
            matrix = weight.to(dtype)
            for start in range(0, len(rows), ctx.size):
                part = slice(start, start + ctx.size)
                logs = _logs(rows[part].to(dtype), matrix, bias, temperature, group)
                index, here = placed(labels[part], logs.shape[1], group)
                found[part] = logs.gather(1, index).squeeze(1) * here
                entropy[part] = _entropy(logs)
        if group is not None:
            dist.all_reduce(both := torch.stack([found, entropy]), group=group)
            found, entropy = both.unbind()
        ctx.save_for_backward(rows, weight, bias, labels)
        ctx.temperature, ctx.dtype, ctx.group = temperature, dtype, group
        ctx.mark_non_differentiable(entropy)
        return found, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, bias, labels = ctx.saved_tensors
        wants = ctx.needs_input_grad
        matrix, hidden = weight.to(ctx.dtype), torch.empty_like(rows) if wants[0] else None
        learnt = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if wants[1] else None
        offset = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wants[2] else None
        with torch.autocast(rows.device.type, enabled=False):
            for start in range(0, len(rows), ctx.size):
                part = slice(start, start + ctx.size)
                x = rows[part].to(ctx.dtype)
                logits = _logs(x, matrix, bias, ctx.temperature, ctx.group).exp_().neg_()
                index, here = placed(labels[part], logits.shape[1], ctx.group)
                logits.scatter_add_(1, index, here.to(logits.dtype).unsqueeze(1))
                logits.mul_(slope[part].unsqueeze(1) / ctx.temperature)
                if offset is not None:
                    offset += logits.sum(0)
                gradient = logits.to(ctx.dtype)
                if hidden is not None:
                    hidden[part] = torch.mm(gradient, matrix).to(rows.dtype)
                if learnt is not None:
                    learnt += torch.mm(gradient.t(), x)
        return hidden, None if learnt is None else learnt.to(weight.dtype), offset, None, None, None


def _logs(
    rows: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    logits = torch.mm(rows, matrix.t()).float()
    if bias is not None:
        logits += bias
    logits = logits / temperature if temperature != 1.0 else logits
    if group is None:
        return F.log_softmax(logits, dim=1)
    peak = logits.amax(dim=1, keepdim=True)
    dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
    logits -= peak
    sums = logits.exp().sum(dim=1, keepdim=True)
    dist.all_reduce(sums, group=group)
    return logits - sums.log()


def document_sums(values: torch.Tensor, documents: torch.Tensor, count: int) -> torch.Tensor:
    """Sums of `values` [B, L] over the tokens of each document, fp32 [B, count]; padding (-1) is left out."""
    inside = documents >= 0
    index = documents.clamp(min=0).long()
    sums = torch.zeros(len(documents), count, dtype=torch.float32, device=values.device)
    return sums.scatter_add(1, index, values.float() * inside)
