"""Pipeline parallelism: layers are cut into stages, and micro-batches run through them by a torch schedule.

A stage is the transformers model itself with the layers, embedding, norm and output layer of other stages left out,
under the names they have in the unsplit model; so masks, positions and checkpoints are those of the unsplit model. An
objective is a function of a model and a batch and knows no stages: it is called once with a stand-in that notes what
the model would be given, and on the last stage once a micro-batch with one that returns what the stages computed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import (
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleZBVZeroBubble,
)
from transformers import PreTrainedModel

from modelyard.errors import RecipeError
from modelyard.train.head import summed_cross_entropy
from modelyard.train.objective import Batch, Objective
from modelyard.train.options import ParallelOptions, TrainOptions
from modelyard.train.parallel.blocks import base_model, final_norm, layer_list
from modelyard.train.parallel.layout import micro_batches, readers
from modelyard.train.parallel.mesh import Topology
from modelyard.train.parallel.routing import Routing, attach_loss, counted_tokens
from modelyard.train.parallel.strategy import Strategy, Sums, add, add_up, gathered, local
from modelyard.train.world import World

_SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}
_IN_A_V = ("zbv", "dualpipev")


def stage_indices(parallel: ParallelOptions, at: int) -> list[int]:
    """Stages of the pipeline worker `at`: in turns, or first and last folded together in a V."""
    n = parallel.pipeline
    if parallel.schedule in _IN_A_V:
        return [at, 2 * n - 1 - at]
    return [at + n * chunk for chunk in range(parallel.chunks)]


def cut_stages(model: PreTrainedModel, topology: Topology, parallel: ParallelOptions) -> list[tuple[int, Any]]:
    """This worker's stages with their numbers; `model`, of one of `PIPELINE_FAMILIES`, gives its parts away."""
    total = parallel.pipeline * parallel.chunks
    return [(i, _stage(model, i, total)) for i in stage_indices(parallel, topology.at["pipeline"])]


class _Layers(nn.ModuleList):
    """Layers under their numbers in the whole model."""

    def __init__(self, layers: Sequence[nn.Module] = (), first: int = 0) -> None:
        super().__init__()
        for index, layer in enumerate(layers):
            self.add_module(str(first + index), layer)


class _Nothing(nn.Module):
    """Position embeddings of a stage after the first: they were added there."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros((), device=position_ids.device)


def _stage(model: PreTrainedModel, index: int, total: int) -> PreTrainedModel:
    name, layers = layer_list(model)
    per, first, last = len(layers) // total, index == 0, index == total - 1
    config = copy.deepcopy(model.config)
    kinds = getattr(config, "layer_types", None)
    with torch.device("meta"):
        stage = type(model)(config)
    if kinds:
        # Layers look up their kind by position in the stage.
        stage.config.layer_types = kinds[index * per : (index + 1) * per]
    base, source = base_model(stage), base_model(model)
    for key, child in source.named_children():
        setattr(base, key, child)
    setattr(base, name, _Layers(list(layers)[index * per : (index + 1) * per], index * per))
    norm = final_norm(model)
    for key, child in list(base.named_children()):
        if (child is norm and not last) or (isinstance(child, nn.Dropout) and not first):
            setattr(base, key, nn.Identity())
        elif key == "wpe" and not first:
            setattr(base, key, _Nothing())
    head = _head_name(model)
    setattr(stage, head, getattr(model, head) if last else nn.Identity())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    if last and tied and not first:
        # A copy of its own: first and last stage may lie on one worker, and FSDP shards each.
        embedding = copy.deepcopy(cast(nn.Embedding, model.get_input_embeddings()))
        stage.set_input_embeddings(embedding)
        getattr(stage, head).weight = embedding.weight
    elif not first:
        stage.set_input_embeddings(nn.Identity())
    stage.forward = partial(_stage_forward, stage, "input_ids" if first else "inputs_embeds")
    return stage


def _head_name(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, child in model.named_children() if child is head)


def _stage_forward(stage: PreTrainedModel, given: str, x: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Hidden states [B, L, H] after this stage's layers; logits on the last one."""
    found: torch.Tensor = type(stage).forward(stage, **{given: x}, **inputs, use_cache=False).logits
    # Zero-bubble schedules detach outputs in place, which a view (all positions of the hidden states) refuses.
    return found.clone() if found._is_view() else found


class Stages(nn.ModuleList):
    """The stages of one worker as one model: parameters bear the names of the unsplit model."""

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield name.partition(".")[2], parameter


class _Noted(Exception):
    """Carries what an objective gives the model out of the objective."""

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.inputs = dict(inputs)


class _Noting:
    """Stands in for the model to learn what an objective calls it with."""

    def __call__(self, **inputs: Any) -> Any:
        raise _Noted(inputs)

    def language_loss(self, inputs: Mapping[str, Any], labels: torch.Tensor, *, sparse: bool = False) -> Any:
        raise _Noted(inputs)


class _Computed:
    """Stands in for the model on the last stage: its logits are there already."""

    def __init__(self, logits: torch.Tensor, pieces: Any) -> None:
        self._logits, self._pieces = logits, pieces

    def __call__(self, **inputs: Any) -> Any:
        return SimpleNamespace(logits=self._logits)

    def language_loss(self, inputs: Mapping[str, Any], labels: torch.Tensor, *, sparse: bool = False) -> Any:
        return summed_cross_entropy(self._logits, labels if self._pieces is None else self._pieces.own(labels))


class Pipeline(Strategy):
    """Stages of a model on several workers; each stage may be split and sharded further."""

    def __init__(
        self,
        stages: list[tuple[int, Any]],
        world: World,
        topology: Topology,
        options: TrainOptions,
        terms: Sequence[str] = (),
    ) -> None:
        super().__init__(Stages([stage for _, stage in stages]), world, topology, terms, averaged=False)
        self._stages, self._parallel = stages, options.parallel
        self._total = options.parallel.pipeline * options.parallel.chunks
        share = -(-options.global_batch // readers(topology.sizes))
        self.micro_batch = -(-share // micro_batches(options, topology.sizes))
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._names: dict[bool, list[str]] = {}
        self._objective: Objective | None = None
        self._batch: dict[str, torch.Tensor] = {}
        self._sums: Sums = {}
        self._scale = 1.0
        self._tied = _tied_name(stages, topology, self._total)
        self._ends = topology.ends

    @property
    def parts(self) -> list[nn.Module]:
        return list(cast(Stages, self.model))

    def route(self, routing: Routing | None) -> None:
        super().route(routing)
        if routing is not None:
            for _, stage in self._stages:
                stage.forward = partial(self._routed, routing, stage.forward)

    def _routed(
        self, routing: Routing, forward: Any, x: torch.Tensor, counted: torch.Tensor | None = None, **inputs: Any
    ) -> torch.Tensor:
        """A stage's forward, whose backward also brings the losses of its routers."""
        if not torch.is_grad_enabled():
            return cast(torch.Tensor, forward(x, **inputs))
        with routing.watched(counted) as watch:
            out: torch.Tensor = forward(x, **inputs)
        loss, metrics = watch.losses()
        add(self._sums, metrics)
        return out if loss is None else attach_loss(out, loss, self._scale)

    def forward_backward(self, objective: Objective, batches: Sequence[Batch], scale: float = 1.0) -> Sums:
        micro = self.micro_batch or 1
        rows = len(batches) * micro
        batch = _joined(batches, rows)
        ids, inputs = self._prepare(objective, batch)
        counted = counted_tokens(batch) if self._routing is not None else None
        if counted is not None:
            inputs["counted"] = counted if self._pieces is None else self._pieces.own(counted)
        self._scale = scale
        args = (ids,) if any(index == 0 for index, _ in self._stages) else ()
        target = torch.arange(rows, device=ids.device)
        schedule = self._schedule(len(batches), micro, ids)
        with self.clock("backward"):  # Forward and backward of different micro-batches run at once.
            schedule.step(*args, target=target, losses=[], return_outputs=False, **inputs)
        self._sum_terms()
        self._sum_tied()
        return self._finish()

    @torch.no_grad()
    def evaluate(self, objective: Objective, batch: Batch) -> Sums:
        """Forward only, stage after stage: a worker that has sent its hidden states takes the next batch."""
        assert self.topology is not None
        ids, inputs = self._prepare(objective, dict(batch))
        line, held = self.topology.along("pipeline"), dict(self._stages)
        x = ids
        for index in range(self._total):
            before, here, after = (line[self._worker(i)] for i in (max(index - 1, 0), index, index + 1))
            if here != self.world.rank:
                continue
            if before != here:
                x = ids.new_empty((*ids.shape, held[index].config.hidden_size), dtype=torch.float32)
                dist.recv(x, before)
            x = held[index](x, **inputs)
            if index + 1 == self._total:
                self._loss(x, torch.arange(len(ids), device=ids.device))
            elif after != here:
                dist.send(x.float().contiguous(), after)
        return self._finish()

    def _worker(self, index: int) -> int:
        """Which pipeline worker holds a stage."""
        n = self._parallel.pipeline
        if self._parallel.schedule in _IN_A_V and index >= n:
            return max(2 * n - 1 - index, 0)
        return index % n

    def owners(self, name: str) -> int:
        stage = self.world.size // self._parallel.pipeline
        return 2 * stage if name == self._tied else stage

    def count(self) -> tuple[int, int]:
        found: dict[str, tuple[int, bool]] = {}
        for part in self.world.gather({n: (p.numel(), p.requires_grad) for n, p in self.model.named_parameters()}):
            found |= part
        return sum(n for n, _ in found.values()), sum(n for n, trained in found.values() if trained)

    def full_state(self, trainable_only: bool = False) -> dict[str, torch.Tensor]:
        assert self.topology is not None
        mine = {n: p for n, p in self.model.named_parameters() if p.requires_grad or not trainable_only}
        # The line of pipeline workers that rank 0 stands in: one worker of every stage.
        line: list[int] = self.world.gather(self.topology.along("pipeline"))[0]
        described = self.world.gather([(n, tuple(p.shape), p.dtype) for n, p in mine.items()])
        found: dict[str, torch.Tensor] = {}
        seen: set[str] = set()
        for at, sender in enumerate(line):
            for name, shape, dtype in described[sender]:
                if name in seen:
                    continue
                seen.add(name)
                whole = gathered(mine[name]) if self.topology.at["pipeline"] == at else None
                if self.world.leads:
                    found[name] = torch.empty(shape, dtype=dtype) if whole is None else whole
                if sender == 0:
                    continue
                if self.world.leads:
                    dist.recv(found[name], sender)
                elif self.world.rank == sender:
                    dist.send(cast(torch.Tensor, whole).contiguous(), 0)
        return found

    def _prepare(self, objective: Objective, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
        """What the first stage is given, and what all stages are given besides."""
        try:
            objective(cast(Any, _Noting()), batch)
        except _Noted as noted:
            inputs = noted.inputs
        else:
            raise RecipeError(
                "the objective did not call the model", place="objective", mend="call model(input_ids=..., ...)"
            )
        if self._pieces is not None:
            inputs = self._pieces.inputs(inputs)
        ids = inputs.pop("input_ids")
        inputs.pop("use_cache", None)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and value.shape[0] != len(ids):
                inputs[name] = value.expand(len(ids), *value.shape[1:])
        self._objective, self._batch, self._sums, self._scale = objective, batch, {}, 1.0
        return ids, inputs

    def _schedule(self, parts: int, micro: int, ids: torch.Tensor) -> Any:
        key = (parts, micro, ids.shape[1])
        if key not in self._schedules:
            assert self.topology is not None
            built = [self._torch_stage(index, stage, micro, ids) for index, stage in self._stages]
            kind = _SCHEDULES[self._parallel.schedule]
            single = self._parallel.schedule in ("gpipe", "1f1b")
            self._schedules[key] = kind(built[0] if single else built, parts, loss_fn=self._loss, scale_grads=False)
        return self._schedules[key]

    def _torch_stage(self, index: int, stage: Any, micro: int, ids: torch.Tensor) -> PipelineStage:
        assert self.topology is not None
        config, length = stage.config, ids.shape[1]
        hidden = torch.empty(micro, length, config.hidden_size, device="meta", requires_grad=True)
        logits = torch.empty(micro, length, config.vocab_size, device="meta", requires_grad=True)
        return PipelineStage(
            stage,
            index,
            self._total,
            self.world.device,
            input_args=torch.empty(micro, length, dtype=torch.int64, device="meta") if index == 0 else hidden,
            output_args=logits if index == self._total - 1 else hidden,
            group=self.topology.group("pipeline"),
        )

    def _loss(self, logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Loss of one micro-batch on the last stage: the objective's, on logits that are there already."""
        assert self._objective is not None
        batch = {name: value[rows] for name, value in self._batch.items()}
        loss, metrics = self._objective(cast(Any, _Computed(logits, self._pieces)), batch)
        add(self._sums, {"loss": loss, **metrics})
        return loss if self._scale == 1.0 else loss * self._scale

    def _finish(self) -> Sums:
        """This worker's sums, the loss on the last stage; zeros under the names only others have."""
        training = torch.is_grad_enabled()
        if training not in self._names:
            everywhere = self.world.gather(list(self._sums))
            self._names[training] = list(dict.fromkeys(name for names in everywhere for name in names))
        zero = torch.zeros((), dtype=torch.float64, device=self.world.device)
        sums = {name: self._sums.get(name, zero) for name in self._names[training]}
        self._objective, self._batch = None, {}
        return self._share(sums)

    def _sum_tied(self) -> None:
        """The tied embedding lies on the first and the last stage: each gets the sum of both gradients."""
        gradients = [local(cast(torch.Tensor, p.grad)) for n, p in self.model.named_parameters() if n == self._tied]
        if len(gradients) == 2:
            both = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(both)
        elif gradients and self._ends is not None:
            add_up(gradients, self._ends)


def _tied_name(stages: Sequence[tuple[int, Any]], topology: Topology, total: int) -> str | None:
    """Name of the embedding where it is the output layer too; None on workers without it."""
    if total == 1:
        return None
    for index, stage in stages:
        if index in (0, total - 1) and stage.config.tie_word_embeddings:
            weight = stage.get_input_embeddings().weight
            return next(str(name) for name, parameter in stage.named_parameters() if parameter is weight)
    return None


def _joined(batches: Sequence[Batch], rows: int) -> dict[str, torch.Tensor]:
    """All micro-batches as one batch of `rows` rows; rows that are missing count nothing."""
    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    have = len(whole["input_ids"])
    if have == rows:
        return whole
    fill = {name: value[-1:].expand(rows - have, *value.shape[1:]).clone() for name, value in whole.items()}
    fill["document_ids"].fill_(-1)
    if "loss_mask" in fill:
        fill["loss_mask"].fill_(False)
    return {name: torch.cat([value, fill[name]]) for name, value in whole.items()}
