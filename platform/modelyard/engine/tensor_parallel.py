"""One model over several devices of a machine: each holds a slice of every layer (Megatron-LM, arXiv:1909.08053).

The engine's process schedules, runs slice 0 and chooses tokens; it starts the processes of the other slices, which run
the same steps. Queries, keys, values and the first feed-forward matrices are cut by rows, what follows them by columns,
so that a block needs two sums over the workers. Embedding, norms, routers and the output layer are whole everywhere.
A step's layout travels between hosts' memories (gloo), sums between the devices (NCCL; gloo on CPUs, for the tests).
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from modelyard.engine.checkpoint import DecoderConfig, read_config, read_tensors
from modelyard.engine.paged import PagedDecoder
from modelyard.engine.paged_layout import Packed
from modelyard.engine.request import EngineStopped
from modelyard.engine.weights import Weights, dense_weights
from modelyard.errors import DataError, ModelyardError, ResourceError

dist: Any = torch.distributed  # its bindings for stores and groups have no types

ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3"}
COLUMNS = {"o_proj", "down_proj", "w2"}
FOREVER = datetime.timedelta(days=365)
"""How long a worker waits for the next step: an engine may idle for days."""
START_S = 900.0
"""Seconds the workers have to load their slices."""

_STOP, _STEP, _TENSOR = range(3)


def local_config(config: DecoderConfig, workers: int) -> DecoderConfig:
    """The shape of one worker's slice.

    Raises DataError where heads or widths do not divide, or the family keeps its matrices in another form.
    """
    e = config.experts
    sizes = {
        "attention heads": config.heads, "key-value heads": config.kv_heads,
        "feed-forward channels": config.intermediate,
        **({"channels of an expert": e.width, "channels of the shared expert": e.shared} if e else {}),
    }  # fmt: skip
    if config.family == "gpt2":
        raise DataError("GPT-2 is not cut over devices", place="engine.tensor_parallel", mend="use 1")
    for name, size in sizes.items():
        if size % workers:
            raise DataError(f"{size} {name} are not divisible by {workers} workers", place="engine.tensor_parallel",
                            mend="use a number that divides " + ", ".join(map(str, sizes.values())))  # fmt: skip
    return replace(
        config,
        heads=config.heads // workers,
        kv_heads=config.kv_heads // workers,
        intermediate=config.intermediate // workers,
        experts=replace(e, width=e.width // workers, shared=e.shared // workers) if e else None,
    )


def cut(name: str, tensor: Tensor, rank: int, workers: int) -> Tensor:
    """A worker's part of a checkpoint tensor, by its Hugging Face name."""
    module, _, kind = name.rpartition(".")
    layer = module.rpartition(".")[2]
    if layer in ROWS:
        return tensor.chunk(workers)[rank]
    if layer in COLUMNS and kind == "weight":
        return tensor.chunk(workers, dim=1)[rank]
    if layer in COLUMNS and rank:
        return torch.zeros_like(tensor)  # a bias is added once
    return tensor


class Peers:
    """The workers of one model, as one of them sees them: `control` between hosts, `data` between devices."""

    def __init__(self, store: Any, rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size = rank, size
        self.control = dist.ProcessGroupGloo(dist.PrefixStore("control", store), rank, size, FOREVER)
        self.data: Any = self.control
        if device.type == "cuda":
            self.data = dist.ProcessGroupNCCL(dist.PrefixStore("data", store), rank, size)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over workers, in place."""
        self.data.allreduce([values]).wait()
        return values

    def tell(self, numbers: list[int]) -> None:
        """What comes next, to all; eight numbers at most besides the kind."""
        header = torch.zeros(9, dtype=torch.int64)
        header[: len(numbers)] = torch.tensor(numbers)
        self.control.broadcast(header, 0).wait()

    def hear(self) -> list[int]:
        header = torch.zeros(9, dtype=torch.int64)
        self.control.broadcast(header, 0).wait()
        told: list[int] = header.tolist()
        return told


class Leader(PagedDecoder):
    """Slice 0, and the processes of the others. Arguments as `PagedDecoder`, besides:

    Args:
        folder: the model's.
        workers: slices.

    Raises:
        ResourceError: a worker could not load its slice.
    """

    def __init__(
        self, folder: Path, config: DecoderConfig, workers: int, blocks: int, size: int, length: int,
        device: torch.device, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        store = dist.TCPStore("127.0.0.1", 0, workers, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        given = (workers, store.port, str(folder), blocks, size, length, device.type, str(dtype).removeprefix("torch."))
        self._others: list[BaseProcess] = [
            context.Process(target=_follow, args=(rank, *given), name=f"slice-{rank}", daemon=True)
            for rank in range(1, workers)
        ]
        for process in self._others:
            process.start()
        try:
            _wait(store, self._others)
            peers = Peers(store, 0, workers, device)
            super().__init__(_load(folder, config, 0, workers, device, dtype), blocks, size, length, peers.sum)
        except BaseException:
            self._kill()
            raise
        self._store, self._peers = store, peers

    def send(self, packed: Packed) -> None:
        """See `PagedDecoder.send`. Raises EngineStopped when a worker has ended."""
        ended = [p.name for p in self._others if not p.is_alive()]
        if ended:
            raise EngineStopped(f"{', '.join(ended)} of the model ended", place="engine.tensor_parallel",
                                mend="start the engine again")  # fmt: skip
        self._peers.tell([_STEP, *packed.numbers])
        self._peers.control.broadcast(packed.buffer.clone(), 0).wait()

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `PagedDecoder.update`; every worker takes its part of each tensor."""

        def told() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                whole = tensor.detach().to(self.device).contiguous()
                about = json.dumps([name, list(whole.shape), str(whole.dtype).removeprefix("torch.")]).encode()
                self._peers.tell([_TENSOR, len(about)])
                self._peers.control.broadcast(torch.frombuffer(bytearray(about), dtype=torch.uint8), 0).wait()
                self._peers.data.broadcast(whole, 0).wait()
                yield name, cut(name, whole, 0, self._peers.size)

        super().update(told())

    def close(self) -> None:
        """Ends the workers."""
        with suppress(RuntimeError):
            if all(p.is_alive() for p in self._others):
                self._peers.tell([_STOP])
        for process in self._others:
            process.join(5)
        self._kill()

    def _kill(self) -> None:
        for process in self._others:
            if process.is_alive():
                process.kill()
            process.join()


def _wait(store: Any, others: list[BaseProcess]) -> None:
    """Until every worker has loaded its slice. Raises ResourceError when one fails."""
    end = time.monotonic() + START_S
    waiting = list(enumerate(others, 1))
    while waiting:
        rank, process = waiting[0]
        if store.check([f"ready/{rank}"]):
            said = store.get(f"ready/{rank}").decode()
            if said:
                raise ResourceError(said, place=f"engine.tensor_parallel, slice {rank}", mend="see the message")
            waiting.pop(0)
        elif not process.is_alive() or time.monotonic() > end:
            raise ResourceError(
                f"slice {rank} did not start (exit code {process.exitcode})",
                place="engine.tensor_parallel",
                mend="see its log; it may have run out of memory",
            )
        else:
            time.sleep(0.02)


def _load(
    folder: Path, config: DecoderConfig, rank: int, workers: int, device: torch.device, dtype: torch.dtype
) -> Weights:
    weights = dense_weights(local_config(config, workers), device, dtype)
    weights.load(((name, cut(name, t, rank, workers)) for name, t in read_tensors(folder)), str(folder))
    return weights


def _follow(
    rank: int, workers: int, port: int, folder: str, blocks: int, size: int, length: int, kind: str, dtype: str
) -> None:
    """A worker's process: runs every step it is told of, until it is told to stop or the engine's process is gone."""
    code = 1
    try:
        _serve(rank, workers, port, Path(folder), blocks, size, length, kind, dtype)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the groups' threads do not outlive an interpreter that takes itself apart: it would abort


def _serve(
    rank: int, workers: int, port: int, folder: Path, blocks: int, size: int, length: int, kind: str, dtype: str
) -> None:
    torch.set_num_threads(1)
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", port, workers, is_master=False)
    try:
        config = read_config(folder)
        weights = _load(folder, config, rank, workers, device, getattr(torch, dtype))
    except (ModelyardError, RuntimeError) as error:
        store.set(f"ready/{rank}", str(error))
        return
    store.set(f"ready/{rank}", "")
    peers = Peers(store, rank, workers, device)
    decoder = PagedDecoder(weights, blocks, size, length, peers.sum)
    with suppress(RuntimeError):  # gloo's way of saying that the engine's process is gone
        while True:
            told = peers.hear()
            if told[0] == _STOP:
                return
            if told[0] == _STEP:
                packed = Packed.empty(told[1:])
                peers.control.broadcast(packed.buffer, 0).wait()
                decoder.compute(packed)
            else:
                _take(decoder, peers, told[1])


def _take(decoder: PagedDecoder, peers: Peers, length: int) -> None:
    about = torch.empty(length, dtype=torch.uint8)
    peers.control.broadcast(about, 0).wait()
    name, shape, dtype = json.loads(bytes(about.tolist()))
    whole = torch.empty(shape, dtype=getattr(torch, dtype), device=decoder.device)
    peers.data.broadcast(whole, 0).wait()
    with suppress(DataError):  # the engine's process finds the same, and says so
        decoder.update([(name, cut(name, whole, peers.rank, peers.size))])
