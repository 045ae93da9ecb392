"""The seam between the loop and parallelism: how the gradients of one optimizer step come about on a mesh.

The loop asks for gradients, for what they add up to, and for held-out losses; it knows no scheme. A `Strategy` is
what data-parallel, sharded, tensor-, context- and expert-parallel layouts share; a pipeline (`pipeline.py`) overrides
`forward_backward` and `evaluate`. Whatever a strategy returns is this worker's additive share: summed over all
workers it is the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from modelyard.models.build import initialise, materialise
from modelyard.models.nf4 import logical_sizes
from modelyard.train.clock import Clock
from modelyard.train.objective import Batch, Objective
from modelyard.train.optimizer import local_gradients, squared_norm
from modelyard.train.parallel.compress import Compression
from modelyard.train.parallel.context import ContextView, Pieces
from modelyard.train.parallel.mesh import Topology
from modelyard.train.parallel.routing import Routing, Watch, counted_tokens
from modelyard.train.world import World

Sums = dict[str, torch.Tensor]


class Strategy:
    """Every worker runs the whole model, or its part of every layer, on its sequences or its part of them.

    Args:
        model: holds this worker's parameters under their names in the unsplit model.
        world: the workers.
        topology: the mesh; None = every worker is a reader of its own, as the model is sharded.
        terms: names of whole parameters whose gradients must be summed over the tensor axis after backward.
        averaged: whether gradients come out averaged over the workers instead of summed.

    Attributes:
        reader, readers: which share of every batch this worker reads, and how many shares there are.
        micro_batch: sequences of one forward pass where the layout decides it; None = the options do.
        clock: where the time of a step is counted, by phase.
        compression: how replicas exchange gradients; None = as they are.
    """

    micro_batch: int | None = None

    def __init__(
        self,
        model: nn.Module,
        world: World,
        topology: Topology | None = None,
        terms: Sequence[str] = (),
        averaged: bool = True,
    ) -> None:
        self.model, self.world, self.topology = model, world, topology
        self.reader, self.readers = world.rank, world.size
        self.clock = Clock(world.device)
        self._terms, self._averaged = tuple(terms), averaged
        self._ddp: DistributedDataParallel | None = None
        self._pieces: Pieces | None = None
        self._routing: Routing | None = None
        self.compression: Compression | None = None
        if topology is not None:
            s = topology.sizes
            self.reader, self.readers = topology.reader, s["data"] * s["shard"] * s["expert"]
            self._pieces = Pieces(topology.group("context")) if s["context"] > 1 else None

    @property
    def parts(self) -> list[nn.Module]:
        """The models that hold this worker's parameters: one, or one a pipeline chunk."""
        return [self.model]

    def materialise(self, seed: int) -> None:
        """Gives a model built on the meta device storage and its initial weights."""
        for part in self.parts:
            materialise(part, self.world.device)
            initialise(cast(Any, part), seed)

    def route(self, routing: Routing | None) -> None:
        """Adds what `routing` asks of the routers to every step."""
        self._routing = routing
        if routing is None:
            return
        if self._pieces is not None and self.topology is not None:
            routing.context = self.topology.group("context")
        for part in self.parts:
            routing.attach(part)

    @property
    def ddp(self) -> DistributedDataParallel | None:
        """The wrapper that exchanges gradients where every worker holds the whole model; takes communication hooks."""
        s = self.topology.sizes if self.topology is not None else {}
        if self._ddp is None and s and s["data"] == self.world.size > 1:
            # Every worker made the same weights: there is nothing to broadcast.
            self._ddp = DistributedDataParallel(self.model, gradient_as_bucket_view=True, init_sync=False)
            if self.compression is not None:
                self.compression.register(self._ddp)
        return self._ddp

    @property
    def casts(self) -> bool:
        """Whether the model has a mixed-precision policy of its own, so that autocast must stay off."""
        return any(isinstance(part, FSDPModule) for part in self.parts)

    @property
    def gradient_scale(self) -> float:
        """What turns the gradients left by `forward_backward` into sums over the global batch."""
        return float(self.world.size) if self._averaged or self.ddp is not None else 1.0

    def forward_backward(self, objective: Objective, batches: Sequence[Batch], scale: float = 1.0) -> Sums:
        """Gradients of `scale` x loss over this worker's micro-batches; sums of loss, weight and further metrics.

        Workers exchange gradients only in the last micro-batch.
        """
        sums: Sums = {}
        view = self._view()
        for index, batch in enumerate(batches):
            last = index + 1 == len(batches)
            with self._quiet(last):
                with self.clock("forward"), self._watched(batch) as watch:
                    loss, metrics = objective(view, batch)
                    # Beside the loss, not in it: losses stay comparable with those of models without experts.
                    extra, routed = watch.losses() if watch is not None else (None, {})
                with self.clock("backward"):
                    whole = loss if extra is None else loss + extra
                    (whole if scale == 1.0 else whole * scale).backward()  # type: ignore[no-untyped-call]
            add(sums, {"loss": loss, **metrics, **routed})
        self._sum_terms()
        return self._share(sums)

    def tally(self) -> torch.Tensor:
        """Further numbers of this step to be summed over workers, float64 [n]; `series` reads the sums."""
        if self._routing is None:
            return torch.zeros(0, dtype=torch.float64, device=self.world.device)
        return next(iter(self._share({"": self._routing.take(self.world.device)}).values()))

    def series(self, totals: list[float]) -> dict[str, float]:
        """What the sums of `tally` say, by name."""
        return self._routing.series(totals) if self._routing is not None else {}

    def _watched(self, batch: Batch) -> AbstractContextManager[Watch | None]:
        if self._routing is None:
            return nullcontext()
        counted = counted_tokens(batch)
        if counted is not None and self._pieces is not None:
            counted = self._pieces.own(counted)
        return self._routing.watched(counted)

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> Sums:
        """The same sums without gradients."""
        loss, metrics = objective(self._view(), batch)
        return self._share(add({}, {"loss": loss, **metrics}))

    def squared_norm(self) -> torch.Tensor:
        """This worker's share of the squared norm of all gradients, a float64 scalar."""
        return squared_norm(self._gradients()).to(self.world.device)

    def scale_gradients(self, factor: float) -> None:
        """Multiplies every gradient in place."""
        for device in {g.device for g, _ in self._gradients()}:
            torch._foreach_mul_([g for g, _ in self._gradients() if g.device == device], factor)

    def owners(self, name: str) -> int:
        """Workers that hold a copy or a shard of the parameter `name`."""
        return self.world.size

    def count(self) -> tuple[int, int]:
        """Parameters of the whole model, and those that are trained. All workers call it together."""
        sizes = logical_sizes(self.model)
        trained = (sizes[name] for name, p in self.model.named_parameters() if p.requires_grad)
        return sum(sizes.values()), sum(trained)

    def full_state(self, trainable_only: bool = False) -> dict[str, torch.Tensor]:
        """Unsharded parameters on rank 0's CPU (other ranks: empty), by name. All ranks call it together.

        One parameter is gathered at a time, so other ranks never hold a second copy of the model.
        """
        found: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if trainable_only and not parameter.requires_grad:
                continue
            whole = gathered(parameter)
            if self.world.leads:
                found[name] = whole
        return found

    def _gradients(self) -> list[tuple[torch.Tensor, int]]:
        named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if self._averaged:
            return local_gradients(p for _, p in named)
        return [pair for n, p in named for pair in local_gradients([p], self.owners(n))]

    def _view(self) -> Any:
        if self._pieces is not None:
            return ContextView(self.model, self._pieces)
        return self.model if self.ddp is None else DdpView(self.ddp)

    def _quiet(self, last: bool) -> Any:
        """Holds gradients back in all but the last micro-batch."""
        for part in self.parts:
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(last)
        return nullcontext() if last or self.ddp is None else self.ddp.no_sync()

    def _share(self, sums: Sums) -> Sums:
        """Workers along the tensor axis computed the same numbers: each reports its part of them."""
        copies = 1 if self.topology is None else self.topology.sizes["tensor"]
        return {name: value / copies for name, value in sums.items()}

    def _sum_terms(self) -> None:
        if not self._terms or self.topology is None:
            return
        wanted, gradients = set(self._terms), []
        for name, parameter in self.model.named_parameters():
            if name in wanted and parameter.grad is not None:
                gradients.append(local(parameter.grad))
        add_up(gradients, self.topology.group("tensor"))


class DdpView:
    """A model under DistributedDataParallel as an objective sees it: calls go through DDP, attributes to the model."""

    def __init__(self, ddp: DistributedDataParallel) -> None:
        self._ddp = ddp

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ddp.module, name)

    def __call__(self, **inputs: Any) -> Any:
        return self._ddp(**inputs)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gathered(parameter: torch.Tensor) -> torch.Tensor:
    """A whole copy on the CPU. All workers that hold a shard call it together."""
    whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole.detach().cpu().clone()


def add_up(tensors: Sequence[torch.Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors over a group in place, by one exchange of all of them."""
    if not tensors:
        return
    flat = torch.cat([t.reshape(-1) for t in tensors])
    dist.all_reduce(flat, group=group)
    parts = torch.split(flat, [t.numel() for t in tensors])
    for tensor, total in zip(tensors, parts, strict=True):
        tensor.copy_(total.view_as(tensor))


def add(sums: Sums, values: Mapping[str, torch.Tensor]) -> Sums:
    """Adds detached values to `sums` in float64, in place, and returns it."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0) + value.detach().double()
    return sums
