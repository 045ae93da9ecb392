"""One model over several devices of a machine: each holds a slice of every layer (Megatron-LM, arXiv:1909.08053).

The engine's process schedules, runs slice 0 and chooses tokens; it starts the processes of the other slices, which run
the same steps. Queries, keys, values and the first feed-forward matrices are cut by rows, what follows them by columns,
so that a block needs two sums over the workers. Embedding, norms, routers and the output layer are whole everywhere.
A step's layout travels between hosts' memories (gloo), sums between the devices (NCCL; gloo on CPUs, for the tests).
Of an adapter every worker reads its own part: B is cut where the layer is cut by rows, A where it is cut by columns.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import sys
import time
import traceback
import weakref
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from modelyard.engine.adapters import Adapter, Groups, read_adapter
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

_STOP, _STEP, _TENSOR, _GROUPS, _ADAPTER, _DROP = range(6)


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


def cut_adapter(name: str, side: str, matrix: Tensor, rank: int, workers: int) -> Tensor:
    """A worker's part of a matrix (A or B) of an adapter of a module."""
    layer = name.rpartition(".")[2]
    if layer == "gate_up_proj" and side == "B":  # all gates, then all ups
        return torch.cat([half.chunk(workers)[rank] for half in matrix.chunk(2)])
    if layer in ROWS and side == "B":
        return matrix.chunk(workers)[rank]
    if layer in COLUMNS and side == "A":
        return matrix.chunk(workers, dim=1)[rank]
    return matrix


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

    def tell_more(self, kind: int, about: Any) -> None:
        """What comes next, and something about it that JSON can say."""
        text = json.dumps(about).encode()
        self.tell([kind, len(text)])
        self.control.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0).wait()

    def hear_more(self, length: int) -> Any:
        """What `tell_more` said, after its header has been heard."""
        text = torch.empty(length, dtype=torch.uint8)
        self.control.broadcast(text, 0).wait()
        return json.loads(bytes(text.tolist()))

    def failures(self, mine: int) -> int:
        """How many workers failed at what they were told, once all have said."""
        count = torch.tensor([mine])
        self.control.allreduce([count]).wait()
        return int(count)


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
        device: torch.device, dtype: torch.dtype, *, fp8: bool = False,
    ) -> None:  # fmt: skip
        store = dist.TCPStore("127.0.0.1", 0, workers, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("spawn")
        given = (
            workers, store.port, str(folder), blocks, size, length, fp8, device.type, str(dtype).removeprefix("torch."),
        )  # fmt: skip
        self._others: list[BaseProcess] = [
            context.Process(target=_follow, args=(rank, *given), name=f"slice-{rank}", daemon=True)
            for rank in range(1, workers)
        ]
        for process in self._others:
            process.start()
        try:
            _wait(store, self._others)
            peers = Peers(store, 0, workers, device)
            own = _load(folder, config, 0, workers, device, dtype)
            super().__init__(own, blocks, size, length, peers.sum, fp8=fp8)
        except BaseException:
            self._kill()
            raise
        self._store, self._peers = store, peers
        self._numbers: dict[bytes, int] = {}
        self._dropped: list[int] = []

    def send(self, packed: Packed, groups: Groups = ()) -> None:
        """See `PagedDecoder.send`. Raises EngineStopped when a worker has ended."""
        self._check()
        while self._dropped:
            self._peers.tell([_DROP, self._dropped.pop()])
        if groups:
            rows = [(self._numbers[a.salt], None if r is None else r.tolist()) for a, r in groups]
            self._peers.tell_more(_GROUPS, rows)
        self._peers.tell([_STEP, *packed.numbers])
        self._peers.control.broadcast(packed.buffer.clone(), 0).wait()

    def update(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `PagedDecoder.update`; every worker takes its part of each tensor."""

        def told() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                whole = tensor.detach().to(self.device).contiguous()
                self._peers.tell_more(_TENSOR, [name, list(whole.shape), str(whole.dtype).removeprefix("torch.")])
                self._peers.data.broadcast(whole, 0).wait()
                yield name, cut(name, whole, 0, self._peers.size)

        super().update(told())

    def adopt(self, adapter: Adapter) -> None:
        """See `PagedDecoder.adopt`; every worker reads its part, meanwhile no step runs.

        Raises DataError when one could not.
        """
        self._check()
        number = len(self._numbers)
        self._numbers[adapter.salt] = number
        self._peers.tell_more(_ADAPTER, [number, adapter.name, str(adapter.folder)])
        if self._peers.failures(0):
            raise DataError("a worker could not read its part of the adapter", place=str(adapter.folder),
                            mend="see its log; all workers read the same folder")  # fmt: skip
        # Requests that run when it is unloaded keep it: the workers forget it when nobody here holds it any more.
        weakref.finalize(adapter, self._dropped.append, number)

    def _check(self) -> None:
        ended = [p.name for p in self._others if not p.is_alive()]
        if ended:
            raise EngineStopped(f"{', '.join(ended)} of the model ended", place="engine.tensor_parallel",
                                mend="start the engine again")  # fmt: skip

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
    weights.share = lambda name, side, matrix: cut_adapter(name, side, matrix, rank, workers)
    weights.load(((name, cut(name, t, rank, workers)) for name, t in read_tensors(folder)), str(folder))
    return weights


def _follow(
    rank: int, workers: int, port: int, folder: str, blocks: int, size: int, length: int, fp8: bool, kind: str,
    dtype: str,
) -> None:  # fmt: skip
    """A worker's process: runs every step it is told of, until it is told to stop or the engine's process is gone."""
    code = 1
    try:
        _serve(rank, workers, port, Path(folder), blocks, size, length, fp8, kind, dtype)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the groups' threads do not outlive an interpreter that takes itself apart: it would abort


def _serve(
    rank: int, workers: int, port: int, folder: Path, blocks: int, size: int, length: int, fp8: bool, kind: str,
    dtype: str,
) -> None:  # fmt: skip
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
    with suppress(RuntimeError):  # gloo's way of saying that the engine's process is gone
        _listen(PagedDecoder(weights, blocks, size, length, peers.sum, fp8=fp8), peers)


def _listen(decoder: PagedDecoder, peers: Peers) -> None:
    """Does what the engine's process says, until it says stop."""
    adapters: dict[int, Adapter] = {}
    groups: Groups = ()
    while True:
        kind, *told = peers.hear()
        if kind == _STOP:
            return
        if kind == _GROUPS:
            found = peers.hear_more(told[0])
            groups = tuple((adapters[n], None if rows is None else torch.tensor(rows)) for n, rows in found)
        elif kind == _STEP:
            packed = Packed.empty(told)
            peers.control.broadcast(packed.buffer, 0).wait()
            decoder.compute(packed, decoder.placed(groups))
            groups = ()
        elif kind == _ADAPTER:
            _read(adapters, decoder, peers, told[0])
        elif kind == _DROP:
            adapters.pop(told[0], None)
        else:
            _take(decoder, peers, told[0])


def _read(adapters: dict[int, Adapter], decoder: PagedDecoder, peers: Peers, length: int) -> None:
    number, name, folder = peers.hear_more(length)
    try:
        adapters[number] = read_adapter(name, Path(folder), decoder.weights, b"")
    except (DataError, OSError):
        traceback.print_exc()
    peers.failures(int(number not in adapters))


def _take(decoder: PagedDecoder, peers: Peers, length: int) -> None:
    name, shape, dtype = peers.hear_more(length)
    whole = torch.empty(shape, dtype=getattr(torch, dtype), device=decoder.device)
    peers.data.broadcast(whole, 0).wait()
    with suppress(DataError):  # the engine's process finds the same, and says so
        decoder.update([(name, cut(name, whole, peers.rank, peers.size))])
