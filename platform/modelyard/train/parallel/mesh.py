"""Device meshes: degrees of parallelism laid over the workers, outermost first as in `layout.AXES`.

Parameters that all workers of a pipeline stage share lie on the *dense* mesh (data, fsdp, tensor), where fsdp runs
over shard, context and expert: whoever computes other tokens holds another shard. Experts lie on a mesh of their own
(fsdp, expert), because their gradients are complete within an expert group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modelyard.train.parallel.layout import AXES
from modelyard.train.world import World


@dataclass(frozen=True)
class Topology:
    """This worker's place in a layout.

    Attributes:
        sizes: degree of every axis.
        at: this worker's coordinate on every axis.
        dense: mesh (pipeline, data, fsdp, tensor).
        sparse: mesh (pipeline, fsdp, expert, tensor) for experts.
        axes: mesh with every axis of its own, for process groups.
        ends: first and last worker of this pipeline; None where this worker is neither.
    """

    sizes: Mapping[str, int]
    at: Mapping[str, int]
    dense: DeviceMesh
    sparse: DeviceMesh
    axes: DeviceMesh
    ends: dist.ProcessGroup | None = None

    @property
    def reader(self) -> int:
        """Which share of a batch this worker reads; workers along tensor, context and pipeline read the same."""
        return (self.at["data"] * self.sizes["shard"] + self.at["shard"]) * self.sizes["expert"] + self.at["expert"]

    @property
    def fsdp(self) -> DeviceMesh | None:
        """Mesh that parameters are sharded over, replicas as its first axis; None where it is this worker alone."""
        sharded = self.sizes["shard"] * self.sizes["context"] * self.sizes["expert"]
        if self.sizes["data"] > 1:
            return self.dense["data", "fsdp"]
        return self.dense["fsdp"] if sharded > 1 else None

    @property
    def expert_fsdp(self) -> DeviceMesh | None:
        """Mesh that experts are sharded over beside the expert axis; None where it is this worker alone."""
        return self.sparse["fsdp"] if self.sparse["fsdp"].size() > 1 else None

    def group(self, axis: str) -> dist.ProcessGroup:
        """The workers along one axis."""
        return self.axes.get_group(axis)

    def along(self, axis: str) -> list[int]:
        """Global ranks of the workers along one axis, in order."""
        return dist.get_process_group_ranks(self.group(axis))


def build_topology(sizes: Mapping[str, int], world: World) -> Topology:
    """Lays the degrees over all ranks; every worker calls it together."""
    s, kind = sizes, world.device.type
    axes = init_device_mesh(kind, tuple(s[name] for name in AXES), mesh_dim_names=AXES)
    dense = init_device_mesh(
        kind,
        (s["pipeline"], s["data"], s["shard"] * s["context"] * s["expert"], s["tensor"]),
        mesh_dim_names=("pipeline", "data", "fsdp", "tensor"),
    )
    sparse = dense
    if s["expert"] > 1:
        sparse = init_device_mesh(
            kind,
            (s["pipeline"], s["data"] * s["shard"] * s["context"], s["expert"], s["tensor"]),
            mesh_dim_names=("pipeline", "fsdp", "expert", "tensor"),
        )
    at = {name: axes.get_local_rank(name) for name in AXES}
    return Topology(dict(sizes), at, dense, sparse, axes, _ends(axes.mesh, s["pipeline"], world.rank))


def _ends(ranks: torch.Tensor, stages: int, rank: int) -> dist.ProcessGroup | None:
    if stages == 1:
        return None
    found = None
    # Every rank takes part in making every group, in the same order.
    for pair in zip(ranks[0].flatten().tolist(), ranks[-1].flatten().tolist(), strict=True):
        group = dist.new_group(list(pair))
        if rank in pair:
            found = group
    return found
