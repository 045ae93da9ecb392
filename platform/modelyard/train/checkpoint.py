"""Sharded checkpoints that are whole or not there: torch DCP files, checksums, and a marker written last.

    {uri}/step-00000120/__0_0.distcp ...   tensors, each worker its shards
    {uri}/step-00000120/.metadata          DCP's index
    {uri}/step-00000120/history.csv        metrics of every step so far
    {uri}/step-00000120/complete.json      step, identity and the checksum of every file; last

A checkpoint without a readable marker, or one whose files differ from it, is passed over with a message and the one
before is used. DCP reshards on load, so the number of workers may change. `uri` must be reachable by all workers.
Training pauses for a copy of its state (as much memory again as the state takes); a thread writes it.
DCP's index is a pickle: it is searched before it is read (`checkpoint_index`), and no pickle from outside is read.
"""

from __future__ import annotations

import csv
import json
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

from modelyard import storage
from modelyard.errors import DataError, StorageError
from modelyard.storage.publish import checksum
from modelyard.train.checkpoint_index import inspect_index
from modelyard.train.metrics import Say, no_say
from modelyard.train.world import World

MARKER = "complete.json"
HISTORY = "history.csv"
Row = dict[str, float]


@dataclass
class State:
    """What a checkpoint holds. `step` is the number of steps done: data position, schedule and RNG follow from it.

    `extra` are further tensors by name (averages, loss scale), which are read back in place.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: int
    history: list[Row]
    extra: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        """Everything to save, by name; shares storage."""
        return tensors(self.model, self.optimizer) | {f"extra.{name}": value for name, value in self.extra.items()}


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `last` ones, the `best` by held-out loss, and those at multiples of `every`."""

    last: int = 2
    best: int = 0
    every: int | None = None

    def chosen(self, heldout: Mapping[int, float | None]) -> set[int]:
        """The steps to keep among those of `heldout`, which maps a step to the loss measured there, if any."""
        steps = sorted(heldout)
        measured = sorted((loss, step) for step, loss in heldout.items() if loss is not None)
        kept = {*steps[-self.last :], *(step for _, step in measured[: self.best])}
        return kept | {step for step in steps if self.every and step % self.every == 0}


class Checkpoints:
    """Checkpoints of one run below `uri` (local or s3://).

    Args:
        uri: where they lie.
        identity: what they belong to (architecture, objective); another one's are refused.
        world: the workers, which all call every method together.
        keep: which to keep.
        say: takes messages for people.
        beside: write in a thread beside training.
    """

    def __init__(
        self,
        uri: str,
        identity: str,
        world: World,
        keep: Keep = Keep(),  # frozen
        say: Say = no_say,
        beside: bool = False,
    ) -> None:
        self.uri, self._identity, self._world, self._keep, self._say = uri, identity, world, keep, say
        self._beside = beside
        # Collectives of two threads must not meet in one group.
        self._writers = world.apart() if beside else world
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def save(self, state: State) -> None:
        """Writes a checkpoint, then removes those not to be kept. Beside training it returns after a copy.

        An error of the write before is raised here, or by `finish`.
        """
        self.finish()
        step, history = state.step, list(state.history)
        if not self._beside:
            self._write(state.tensors(), step, history)
            return
        copies = {name: value.clone() for name, value in state.tensors().items()}
        self._thread = threading.Thread(
            target=self._write_beside, args=(copies, step, history), name=f"checkpoint-{step}", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Waits until what was saved is written, and raises the error if that failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _write_beside(self, copies: dict[str, Any], step: int, history: list[Row]) -> None:
        try:
            self._write(copies, step, history)
        except BaseException as error:  # handed to the training thread, which raises it
            self._failure = error

    def _write(self, values: dict[str, Any], step: int, history: list[Row]) -> None:
        target, world = storage.join(self.uri, f"step-{step:08d}"), self._writers
        with self._staging(target) as folder:
            self._clear(target, folder)
            with _quiet():
                writer = FileSystemWriter(str(folder), single_file_per_rank=True, thread_count=1)
                save_shards(values, storage_writer=writer, process_group=world.group)
            if world.leads:
                write_history(folder / HISTORY, history)
            files = self._publish(folder, target)
        if world.leads:
            heldout = history[-1].get("heldout_loss") if history else None
            marker = {
                "step": step,
                "identity": self._identity,
                "workers": world.size,
                "heldout_loss": heldout if heldout is not None and math.isfinite(heldout) else None,
                "files": files,
            }
            storage.write_bytes(storage.join(target, MARKER), json.dumps(marker, indent=1).encode())
            self._prune()
        world.barrier()

    def rewind(self, state: State, step: int) -> bool:
        """Loads the newest whole checkpoint of at most `step` steps and forgets those after it; False: there is none.

        Raises:
            DataError: it belongs to another architecture or objective.
        """
        self.finish()
        names = [name for name in self._names() if _step(name) > step]
        self._world.barrier()
        if self._world.leads:
            for name in names:
                storage.remove(storage.join(self.uri, name, MARKER))
                storage.remove(storage.join(self.uri, name))
        self._world.barrier()
        return self.restore(state)

    def restore(self, state: State) -> bool:
        """Loads the newest whole checkpoint into `state` in place; False when there is none.

        Raises:
            DataError: it belongs to another architecture or objective.
        """
        for name in sorted(self._names(), reverse=True):
            place = storage.join(self.uri, name)
            marker, problem = self._inspect(place)
            if problem:
                self._tell(f"checkpoint {name} is {problem}; trying the one before")
                continue
            if marker["identity"] != self._identity:
                raise DataError(
                    f"the checkpoint belongs to {marker['identity']}, this run is {self._identity}",
                    place=place,
                    mend="remove it or train in another folder",
                )
            self._load(place, marker, state)
            self._tell(f"resumed from {name} (written by {marker['workers']} workers)")
            return True
        return False

    def _load(self, place: str, marker: dict[str, Any], state: State) -> None:
        prepare(state.optimizer)
        with self._fetched(place) as folder, _quiet():
            inspect_index(folder / ".metadata")
            try:
                load_shards(state.tensors(), storage_reader=FileSystemReader(str(folder)))
            except CheckpointException as error:
                raise DataError(
                    "the checkpoint does not hold what this run needs (another optimizer, or no averages?)",
                    place=place,
                    mend="train with the options it was written with, or in another folder",
                ) from error
            state.history = read_history(folder / HISTORY)
        state.step = int(marker["step"])

    def _tell(self, text: str) -> None:
        if self._world.leads:
            self._say(text)

    def _names(self) -> list[str]:
        """Folders that may be checkpoints, the same list on every worker."""
        found: list[str] = []
        if self._world.leads:
            fs, path = storage.filesystem(self.uri)
            if fs.exists(path):
                found = [str(n).rstrip("/").rsplit("/", 1)[-1] for n in fs.ls(path, detail=False)]
        shared: list[str] = self._world.gather([n for n in found if n.startswith("step-")])[0]
        return shared

    def _inspect(self, place: str) -> tuple[dict[str, Any], str]:
        """The marker, and what is wrong with the checkpoint (empty = nothing). Workers share the reading."""
        marker: dict[str, Any] = {}
        try:
            marker = json.loads(storage.read_bytes(storage.join(place, MARKER)))
            mine = sorted(marker["files"])[self._world.rank :: self._world.size]
            bad = [n for n in mine if _differs(storage.join(place, n), marker["files"][n])]
            problem = f"damaged ({bad[0]})" if bad else ""
        except (StorageError, ValueError, KeyError, TypeError):
            problem = "not complete"
        problems = [p for p in self._world.gather(problem) if p]
        return marker, problems[0] if problems else ""

    def _clear(self, target: str, folder: Path) -> None:
        if self._writers.leads and storage.exists(target):
            storage.remove(target)
        self._writers.barrier()
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def _staging(self, target: str) -> Iterator[Path]:
        if not storage.is_remote(target):
            yield Path(storage.filesystem(target)[1])
            return
        with tempfile.TemporaryDirectory(prefix="modelyard-checkpoint-") as folder:
            yield Path(folder)

    @contextmanager
    def _fetched(self, place: str) -> Iterator[Path]:
        if not storage.is_remote(place):
            yield Path(storage.filesystem(place)[1])
            return
        with tempfile.TemporaryDirectory(prefix="modelyard-checkpoint-") as folder:
            yield storage.download(place, folder)

    def _publish(self, folder: Path, target: str) -> dict[str, dict[str, Any]]:
        """Uploads this worker's files where the target is remote; sizes and checksums of everyone's."""
        mine = [p for p in folder.iterdir() if p.name.startswith(f"__{self._writers.rank}_")]
        if self._writers.leads:
            mine += [p for p in (folder / ".metadata", folder / HISTORY) if p.exists()]
        if storage.is_remote(target):
            for path in mine:
                fs, to = storage.filesystem(storage.join(target, path.name))
                fs.put_file(str(path), to)
        described = {p.name: {"bytes": p.stat().st_size, "checksum": checksum(str(p))} for p in mine}
        everyone: dict[str, dict[str, Any]] = {}
        for part in self._writers.gather(described):
            everyone |= part
        return everyone

    def _prune(self) -> None:
        fs, path = storage.filesystem(self.uri)
        names = sorted(str(n).rstrip("/").rsplit("/", 1)[-1] for n in fs.ls(path, detail=False))
        complete = [n for n in names if n.startswith("step-") and storage.exists(storage.join(self.uri, n, MARKER))]
        kept = self._keep.chosen({_step(n): self._heldout(n) for n in complete})
        for name in complete:
            if _step(name) not in kept:
                # The marker goes first: a half-removed checkpoint must not look whole.
                storage.remove(storage.join(self.uri, name, MARKER))
                storage.remove(storage.join(self.uri, name))

    def _heldout(self, name: str) -> float | None:
        if not self._keep.best:
            return None
        value = json.loads(storage.read_bytes(storage.join(self.uri, name, MARKER))).get("heldout_loss")
        return None if value is None else float(value)


def _step(name: str) -> int:
    return int(name.rsplit("-", 1)[-1])


def _differs(place: str, entry: dict[str, Any]) -> bool:
    fs, path = storage.filesystem(place)
    if not fs.exists(path) or fs.size(path) != entry["bytes"]:
        return True
    return checksum(place) != str(entry["checksum"])


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Trainable parameters and their optimizer state by name; DTensors where sharded. Shares storage.

    Frozen parameters (under an adapter) stay out: they come from the model that is being adapted.
    """
    found: dict[str, Any] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                found[f"optimizer.{name}.{key}"] = value
    return found


def prepare(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer allocate its state without changing a weight, so that a checkpoint can be read into it."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def write_history(path: Path, rows: list[Row]) -> None:
    """Metrics of all steps as CSV: `step` first, then every name that occurs; empty where a step lacks it."""
    names = ["step", *dict.fromkeys(n for row in rows for n in row if n != "step")]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, names, restval="")
        writer.writeheader()
        writer.writerows({k: repr(v) for k, v in row.items()} for row in rows)


def read_history(path: Path) -> list[Row]:
    """The reverse of :func:`write_history`."""
    with path.open(newline="", encoding="utf-8") as handle:
        return [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(handle)]


def _number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns when it runs without a process group, which is how one worker runs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        warnings.filterwarnings("ignore", message=".*is disabled, unavailable or uninitialized.*")
        warnings.filterwarnings("ignore", category=FutureWarning)
        yield
