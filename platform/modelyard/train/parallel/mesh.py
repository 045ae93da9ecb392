"""The device mesh: degrees of parallelism laid over the workers."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from modelyard.errors import ResourceError
from modelyard.train.options import ParallelOptions


def degrees(options: ParallelOptions, workers: int) -> dict[str, int]:
    """Size of every mesh axis, outermost first: `data` (replicas), `shard`.

    Raises:
        ResourceError: the product is not the number of workers.
    """
    shard = options.shard or max(1, workers // options.data)
    if options.data * shard != workers:
        raise ResourceError(
            f"data {options.data} x shard {shard} is {options.data * shard}, but there are {workers} workers",
            place="parallel",
            mend="choose degrees whose product is resources.workers, or leave parallel out",
        )
    return {"data": options.data, "shard": shard}


def build_mesh(sizes: dict[str, int], device_type: str) -> DeviceMesh:
    """A mesh over all ranks. `shard` is always an axis, others only where their size is above 1."""
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))
