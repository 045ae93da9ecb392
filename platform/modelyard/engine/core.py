"""The step loop: schedule, compute, choose, deliver. Synchronous; one thread at a time may use it."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelyard.engine.checkpoint import check_folder, read_config, read_tensors
from modelyard.engine.decoder import Decoder
from modelyard.engine.detokenize import Detokenizer
from modelyard.engine.options import EngineOptions
from modelyard.engine.request import EngineStats, Finish, Request, StepOutput
from modelyard.engine.sampler import Choice, sample
from modelyard.engine.scheduler import Scheduler, Sequence
from modelyard.engine.tokenizer import Tokenizer
from modelyard.engine.weights import Weights
from modelyard.errors import DataError, ResourceError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Totals:
    prompt: int = 0
    output: int = 0
    steps: int = 0
    finished: int = 0
    aborted: int = 0
    batch: int = 0


class EngineCore:
    """One model and the requests it is continuing.

    Args:
        folder: a Hugging Face model folder (config.json, *.safetensors, tokenizer.json).
        options: sizes, budget, precision.

    Raises:
        DataError: the folder is incomplete, unsafe or of another architecture.
        ResourceError: the key/value cache does not fit in memory.
    """

    def __init__(self, folder: str | Path, options: EngineOptions | None = None) -> None:
        self.options = options or EngineOptions()
        path = Path(folder)
        check_folder(path)
        self.config = read_config(path)
        self.max_length = self.config.length(self.options.max_length)
        _check_cache(self.config.cache_bytes_per_token * self.max_length * self.options.max_sequences, self.options)
        self.tokenizer = Tokenizer(path) if (path / "tokenizer.json").exists() else None
        torch.set_num_threads(self.options.threads or len(os.sched_getaffinity(0)))
        weights = Weights(self.config, self.options.precision)
        weights.load(read_tensors(path), str(path))
        self.decoder = Decoder(weights, self.options.max_sequences, self.max_length)
        self.scheduler = Scheduler(self.options.max_sequences, self.options.step_tokens)
        self.version = 0
        self._sequences: dict[str, Sequence] = {}
        self._text: dict[str, Detokenizer] = {}
        self._arrivals = 0
        self._totals = _Totals()

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences)

    def check(self, request: Request) -> None:
        """Raises DataError for a request that can never run."""
        request.sampling.check(self.config.vocabulary)
        if not request.prompt:
            raise DataError("the prompt is empty", place="prompt", mend="send at least one token")
        if len(request.prompt) >= self.max_length:
            raise DataError(
                f"the prompt has {len(request.prompt)} tokens, the model takes {self.max_length} with the answer",
                place="prompt",
                mend="shorten the prompt",
            )
        if not all(0 <= t < self.config.vocabulary for t in request.prompt):
            raise DataError("a token id is outside the vocabulary", place="prompt", mend="use the model's tokenizer")
        if self.tokenizer is None and (request.detokenize or request.sampling.stop):
            raise DataError("the model folder has no tokenizer", place="detokenize", mend="ask for tokens only")

    def add(self, request: Request) -> None:
        """Queues a request. Raises DataError when it can never run, ResourceError when too many wait."""
        self.check(request)
        if request.id in self._sequences:
            raise DataError(f"request {request.id} is already running", place="id", mend="use another id")
        free = self.scheduler.slots.count - self.scheduler.slots.used
        if self.scheduler.waiting >= self.options.max_waiting + free:
            raise ResourceError("too many requests are waiting", place="engine", mend="try again later")
        self._arrivals += 1
        seed = request.sampling.seed
        sequence = Sequence(
            request=request,
            arrival=self._arrivals,
            arrived=time.monotonic(),
            tokens=list(request.prompt),
            seed=secrets.randbits(63) if seed is None else seed,
            limit=min(request.sampling.max_tokens, self.max_length - len(request.prompt)),
        )
        self._sequences[request.id] = sequence
        if self.tokenizer is not None and (request.detokenize or request.sampling.stop):
            self._text[request.id] = Detokenizer(self.tokenizer, request.sampling.stop)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> StepOutput | None:
        """Ends a request; None when it is not known (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._totals.aborted += 1
        self._remove(sequence)
        return StepOutput((), finish="abort", weights=self.version)

    def step(self) -> list[tuple[str, StepOutput]]:
        """Computes one step and returns what each advanced request gained."""
        for source, target, tokens in self.scheduler.compact():
            self.decoder.cache.move(source, target, tokens)
        pieces = self.scheduler.schedule()
        if not pieces:
            return []
        batch = self.decoder.batch(pieces)
        logits = self.decoder.forward(batch)
        self._totals.steps += 1
        self._totals.batch = len(pieces)
        for piece in pieces:
            before = piece.sequence.computed
            self._totals.prompt += max(0, min(before + piece.count, piece.sequence.prompt_length) - before)
            piece.sequence.computed += piece.count
        choices = sample(logits, list(batch.sampled)) if batch.sampled else []
        return [(s.request.id, self._advance(s, c)) for s, c in zip(batch.sampled, choices, strict=True)]

    def _advance(self, sequence: Sequence, choice: Choice) -> StepOutput:
        """Appends a chosen token, finds out whether the answer ends, and makes the output."""
        if choice.token < 0:
            self.decoder.cache.clear(sequence.slot)
            self._remove(sequence)
            error = "the model produced numbers that are not finite"
            return StepOutput((), finish="error", weights=self.version, error=error)
        token = choice.token
        sequence.tokens.append(token)
        sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
        self._totals.output += 1
        text, finish = self._read(sequence, token)
        if finish is not None:
            self._totals.finished += 1
            self._remove(sequence)
        logprobs = (choice.logprob,) if choice.logprob is not None else ()
        return StepOutput((token,), text, logprobs, finish, self.version, sequence.waited)

    def _read(self, sequence: Sequence, token: int) -> tuple[str, Finish | None]:
        """Text that became certain with `token`, and why the answer ends with it, if it does."""
        p = sequence.request.sampling
        text = self._text.get(sequence.request.id)
        if token in p.stop_tokens or (not p.ignore_eos and token in self.config.end_tokens):
            return (text.flush() if text else ""), "stop"
        piece, stopped = text.push(token) if text else ("", False)
        if stopped:
            return piece, "stop"
        if sequence.generated >= sequence.limit:
            return piece + (text.flush() if text else ""), "length"
        return piece, None

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request.id]
        self._text.pop(sequence.request.id, None)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`."""
        self.decoder.weights.update(weights, place="update_weights")
        self.version = version
        self.scheduler.recompute()

    def stats(self) -> EngineStats:
        """A snapshot; safe to call from another thread."""
        t, running = self._totals, list(self.scheduler.running)
        return EngineStats(
            waiting=self.scheduler.waiting,
            running=len(running),
            waiting_tokens=self.scheduler.waiting_tokens,
            slots=self.scheduler.slots.count,
            cached_tokens=sum(s.computed for s in running),
            cache_capacity=self.scheduler.slots.count * self.max_length,
            prompt_tokens_total=t.prompt,
            output_tokens_total=t.output,
            steps_total=t.steps,
            finished_total=t.finished,
            aborted_total=t.aborted,
            last_batch=t.batch,
            weights=self.version,
        )

    def invariants(self) -> list[str]:
        """What is wrong with the bookkeeping; an empty list when nothing is."""
        faults = self.scheduler.invariants()
        held = self.scheduler.waiting + len(self.scheduler.running)
        if held != len(self._sequences):
            faults.append(f"{len(self._sequences)} requests are known, {held} are scheduled")
        if not set(self._text) <= set(self._sequences):
            faults.append("text of a finished request is kept")
        return faults


def _check_cache(needed: int, options: EngineOptions) -> None:
    import psutil

    bound = options.cache_bytes if options.cache_bytes is not None else int(0.6 * psutil.virtual_memory().available)
    if needed > bound:
        raise ResourceError(
            f"the key/value cache needs {needed / 2**20:,.0f} MiB, {bound / 2**20:,.0f} MiB are allowed",
            place="engine.max_sequences, engine.max_length",
            mend="lower max_sequences or max_length, or raise cache_bytes",
        )


@dataclass(frozen=True)
class Completion:
    """A finished answer: everything its step outputs said, as one."""

    request: Request
    output: StepOutput


def generate(core: EngineCore, requests: Iterable[Request]) -> list[Completion]:
    """Continues all requests and returns their answers in order. For programs that need no streaming."""
    wanted = list(requests)
    outputs: dict[str, StepOutput] = {}
    queue = iter(wanted)
    pending = next(queue, None)
    while pending is not None or core.busy:
        while pending is not None and core.scheduler.waiting < core.options.max_sequences:
            core.add(pending)
            pending = next(queue, None)
        for name, output in core.step():
            outputs[name] = outputs[name] + output if name in outputs else output
    return [Completion(r, outputs[r.id]) for r in wanted]
