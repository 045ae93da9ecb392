"""Mixtures of experts in training: losses that keep routers even, an optional capacity, and how experts are used.

Hooks on transformers' routers note logits and choices; nothing else of the model changes. The losses are sums over
tokens that count, as an objective's loss is, and are taken **sequence by sequence**: whatever a batch is cut into
(workers, micro-batches, expert groups), they add up to the same number. Two losses a router:

- balance (Switch Transformer, arXiv 2101.03961, eq. 4; a sequence at a time as DeepSeek-V3, arXiv 2412.19437, eq. 17):
  E / k x sum_e f_e P_e, with f_e the choices of expert e a token and P_e its mean probability; 1 = even.
- z (ST-MoE, arXiv 2202.08906, eq. 5): the squared log-sum-exp of the logits, which keeps them small.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from modelyard.errors import RecipeError
from modelyard.train.method_options import RoutingOptions
from modelyard.train.parallel import exchange
from modelyard.train.parallel.experts import expert_layers

Noted = tuple[int, torch.Tensor, torch.Tensor]
"""Number of a router, its logits [T, E] and its choices [T, k], of one call."""


def routers(model: nn.Module) -> dict[str, nn.Module]:
    """The routers of a model by name: `gate` beside `experts`, as Mixtral, Qwen-MoE and OLMoE have them."""
    return {
        f"{name}.gate": module.gate
        for name, module in model.named_modules()
        if hasattr(module, "experts") and hasattr(getattr(module, "gate", None), "top_k")
    }


def find_routing(model: nn.Module, options: RoutingOptions | None) -> Routing | None:
    """What `options` ask for on `model` as a whole; None where nothing is asked for or nothing is routed.

    Raises:
        RecipeError: the model has experts whose router is not known here.
    """
    if options is None:
        return None
    found = routers(model)
    if found:
        sizes = {int(router.num_experts) for router in found.values()}  # type: ignore[arg-type]
        return Routing(list(found), max(sizes), options)
    if expert_layers(model):
        raise RecipeError(
            f"the routers of a {type(model).__name__} are not known",
            place="routing",
            mend="set routing to null, or use a Mixtral, Qwen-MoE or OLMoE model",
        )
    return None


class Routing:
    """The routers of one worker's model, or of its pipeline stages.

    Args:
        names: of all routers of the whole model, in order.
        experts: of a layer.
        options: weights of the losses, and the capacity.

    Attributes:
        context: workers that hold pieces of the same sequences; None = sequences are whole.
    """

    def __init__(self, names: list[str], experts: int, options: RoutingOptions) -> None:
        self._numbers = {name: i for i, name in enumerate(names)}
        self._experts, self._options = experts, options
        self.context: dist.ProcessGroup | None = None
        self._shape = (0, 0)
        self._noted: list[Noted] | None = None
        self._counts: torch.Tensor | None = None

    def attach(self, model: nn.Module) -> None:
        """Hooks onto the routers that `model` holds."""
        model.register_forward_pre_hook(self._note_shape, with_kwargs=True)
        for name, router in routers(model).items():
            router.register_forward_hook(partial(self._note, self._numbers[name]))

    def _note_shape(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        self._shape = tuple(given.shape[:2])  # type: ignore[union-attr]

    def _note(self, number: int, router: Any, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        # Nothing is computed on the noted tensors here: a block that recomputes runs this twice, and must save
        # the same tensors both times.
        logits, scores, index = output
        if self._noted is not None:
            self._noted.append((number, logits, index))
        if self._options.capacity is None or not router.training:
            return None
        return logits, scores * self._within(index).to(scores.dtype), index

    @torch.no_grad()
    def _within(self, index: torch.Tensor) -> torch.Tensor:
        """Which choices [T, k] an expert has room for, in the order of tokens: what follows never decides."""
        chosen = index.shape[1]
        whole = index.view(self._shape[0], -1)
        if self.context is not None:
            whole = exchange.gather(whole, self.context, 1)
        room = self._options.room(whole.shape[1] // chosen, chosen, self._experts)
        order = whole.argsort(dim=1, stable=True)
        grouped = whole.gather(1, order)
        counts = torch.zeros(len(whole), self._experts, dtype=torch.int64, device=index.device)
        counts.scatter_add_(1, whole, torch.ones_like(whole))
        starts = counts.cumsum(1) - counts
        place = torch.arange(whole.shape[1], device=index.device) - starts.gather(1, grouped)
        kept = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, order, place < room)
        if self.context is not None:
            kept = exchange.own(kept, self.context, 1)
        return kept.reshape(-1, chosen)

    @contextmanager
    def watched(self, counted: torch.Tensor | None) -> Iterator[Watch]:
        """Notes what routers do in the body; `counted` bool [B, L]: tokens that count, None = all."""
        noted: list[Noted] = []
        self._noted, watch = noted, Watch(self, noted, counted)
        try:
            yield watch
        finally:
            self._noted = None

    def losses(self, noted: list[Noted], counted: torch.Tensor | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted sum of both losses over noted calls; each as a metric, a sum over tokens and mean of layers."""
        device = noted[0][1].device
        total, balance, z = torch.zeros(3, device=device).unbind()
        for number, logits, index in noted:
            mask = self._mask(counted, logits)
            scores, choices = logits.float().view(*mask.shape, -1), index.view(*mask.shape, -1)
            even = self._balance(scores, choices, mask, number)
            small = (scores.logsumexp(-1).square() * mask).sum()
            total = total + self._options.balance * even + self._options.z * small
            balance, z = balance + even.detach(), z + small.detach()
        layers = len(self._numbers)
        # Every worker of a context group has the balance of whole sequences.
        copies = 1 if self.context is None else dist.get_world_size(self.context)
        return total, {"balance_loss": balance / layers / copies, "router_z_loss": z / layers}

    def _mask(self, counted: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
        """1 at tokens that count, float [B, L]; an objective that calls the model with other tokens counts all."""
        if counted is not None and counted.numel() == len(logits):
            return counted.float()
        shape = self._shape if self._shape[0] * self._shape[1] == len(logits) else (1, len(logits))
        return torch.ones(shape, device=logits.device)

    def _balance(self, scores: torch.Tensor, choices: torch.Tensor, mask: torch.Tensor, number: int) -> torch.Tensor:
        """Scores [B, L, E], choices [B, L, k] -> sum over sequences of tokens x E / k x sum_e f_e P_e."""
        chosen = choices.shape[-1]
        with torch.no_grad():
            counts = torch.zeros(len(scores), self._experts, device=scores.device)
            counts.scatter_add_(1, choices.flatten(1), mask.repeat_interleave(chosen, dim=1))
            self._tally(number, counts.sum(0).double())
            tokens = mask.sum(1)
        chances = (scores.softmax(-1) * mask.unsqueeze(-1)).sum(1)
        if self.context is not None:
            chances = exchange.total(chances, self.context)
            dist.all_reduce(both := torch.cat([counts, tokens.unsqueeze(1)], dim=1), group=self.context)
            counts, tokens = both[:, :-1], both[:, -1]
        each = (counts * chances).sum(1) * (self._experts / chosen) / tokens.clamp(min=1)
        return each.sum()

    def _tally(self, number: int, counts: torch.Tensor) -> None:
        if self._counts is None:
            self._counts = torch.zeros(len(self._numbers), self._experts, dtype=torch.float64, device=counts.device)
        self._counts[number] += counts

    def take(self, device: torch.device) -> torch.Tensor:
        """Choices by router and expert since the last call, float64 [routers x E]; a share to be summed."""
        counts, self._counts = self._counts, None
        if counts is None:
            return torch.zeros(len(self._numbers) * self._experts, dtype=torch.float64, device=device)
        return counts.reshape(-1)

    def series(self, totals: list[float]) -> dict[str, float]:
        """How experts were used in a step, from the sums of `take` over all workers.

        `expert_peak`: the busiest expert of any layer over an even share (1 = even, E = all tokens to one);
        `expert_use`: experts that are effectively used, as a share (exponential of the entropy, mean of layers);
        `dead_experts`: experts of all layers that got no token.
        """
        counts = torch.tensor(totals, dtype=torch.float64).view(len(self._numbers), self._experts)
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        entropy = -(shares * shares.clamp(min=1e-300).log()).sum(1)
        return {
            "expert_peak": float(shares.max()) * self._experts,
            "expert_use": float(entropy.exp().mean()) / self._experts,
            "dead_experts": float((counts == 0).sum()),
        }


class Watch:
    """What routers did in one forward pass."""

    def __init__(self, routing: Routing, noted: list[Noted], counted: torch.Tensor | None) -> None:
        self._routing, self._noted, self._counted = routing, noted, counted

    def losses(self) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """See `Routing.losses`; None and nothing where no router was called."""
        return self._routing.losses(self._noted, self._counted) if self._noted else (None, {})


def counted_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Tokens whose routing counts, bool [B, L]: those of documents, and of answers where only these are learnt."""
    documents = batch.get("document_ids")
    if documents is None:
        return None
    counted = documents >= 0
    return counted & batch["loss_mask"].bool() if "loss_mask" in batch else counted


def attach_loss(out: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
    """`out` unchanged; its backward also sends `scale` into `loss`: a pipeline stage has no loss of its own."""
    return _Attach.apply(out, loss, scale)  # type: ignore[no-untyped-call, no-any-return]


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, loss: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.scale = torch.full_like(loss, scale)
        return out.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return grad, ctx.scale, None
