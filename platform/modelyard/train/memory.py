"""Memory of a worker: how much it held, and an error a person can act on when there was not enough."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from modelyard.errors import ResourceError
from modelyard.planner import formatting as fmt
from modelyard.planner.machine import free_memory

_CPU_SIGN = "can't allocate memory"
"""What torch's CPU allocator says in a plain RuntimeError."""


class OutOfMemoryError(ResourceError):
    """A worker needed more memory than there was."""


def peak_memory(device: torch.device) -> int:
    """The most bytes this process has held: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kilobytes on Linux, bytes on macOS.
    return peak if sys.platform == "darwin" else peak * 1024


def room(device: torch.device) -> int:
    """Bytes this worker could hold: the GPU's memory, or what it has and what the machine has free."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return int(psutil.Process().memory_info().rss + free_memory())


def lacks_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, of a GPU or of this machine."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_SIGN in str(error)


@contextmanager
def memory_named(device: torch.device, predicted: int | None = None) -> Iterator[None]:
    """Turns running out of memory in the body into a named error.

    Args:
        device: where the worker computes.
        predicted: bytes the planner predicted for a worker; None = not known.

    Raises:
        OutOfMemoryError: what was predicted, what there is, and which knob to turn.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise out_of_memory(str(error).splitlines()[0], room(device), predicted) from error


def out_of_memory(cause: str, available: int | None, predicted: int | None) -> OutOfMemoryError:
    """The error, with what is known of prediction and machine."""
    known = []
    if predicted is not None:
        known.append(f"{fmt.size(predicted)} were predicted")
    if available is not None:
        known.append(f"{fmt.size(available)} are available")
    return OutOfMemoryError(
        "a worker ran out of memory" + (f": {', '.join(known)}" if known else ""),
        place=cause,
        mend="lower micro_batch first (the losses stay the same); then turn on recomputation, use more workers to "
        "shard over, a shorter sequence_length or a smaller model",
    )
