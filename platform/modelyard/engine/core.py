"""The step loop: schedule, compute, choose, deliver. Synchronous; one thread at a time may use it."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from modelyard.engine.adapters import Adapter, read_adapter
from modelyard.engine.batch import StepBatch, lay_out
from modelyard.engine.blocks import Blocks
from modelyard.engine.build import build
from modelyard.engine.detokenize import Detokenizer
from modelyard.engine.grammar import Grammars, Matcher
from modelyard.engine.measure import gather
from modelyard.engine.options import EngineOptions
from modelyard.engine.paged import PagedDecoder
from modelyard.engine.request import UNSATISFIED, EngineStats, Finish, Request, StepOutput, check
from modelyard.engine.sampler import Choice, sample
from modelyard.engine.scheduler import Scheduler, Sequence
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
    drafted: int = 0
    accepted: int = 0


class EngineCore:
    """One model and the requests it is continuing.

    Args:
        folder: a Hugging Face model folder (config.json, *.safetensors, tokenizer.json).
        options: sizes, budget, precision.

    Raises:
        DataError: the folder is incomplete, unsafe or of another architecture.
        ResourceError: the key/value cache does not fit in memory, or int8 costs too much quality.
    """

    def __init__(self, folder: str | Path, options: EngineOptions | None = None) -> None:
        self.options = o = options or EngineOptions()
        torch.set_num_threads(o.threads or len(os.sched_getaffinity(0)))
        parts = build(Path(folder), o)
        self.config, self.max_length, self.tokenizer = parts.config, parts.max_length, parts.tokenizer
        self.decoder, self.guesser = parts.decoder, parts.guesser
        blocks = Blocks(parts.blocks, o.block_tokens)
        native = o.backend != "transformers"
        # Another backend takes prompts whole and keeps keys and values its own way.
        budget = (o.step_tokens or parts.step_tokens) if native else o.max_sequences * self.max_length
        self.scheduler = Scheduler(o.max_sequences, budget, blocks, prefix_cache=native and o.prefix_cache)
        self._cache = parts.cache
        self.version = 0
        self.paused = False
        self.adapters: dict[str, Adapter] = {}
        self._grammars = (
            Grammars(self.tokenizer, self.config.vocabulary, self.config.end_tokens) if self.tokenizer else None
        )
        self._sequences: dict[str, Sequence] = {}
        self._text: dict[str, Detokenizer] = {}
        self._arrivals, self._adapters_read = 0, itertools.count(1)
        self._totals = _Totals()

    @property
    def busy(self) -> bool:
        """Whether a step would do something."""
        return bool(self._sequences) and not self.paused

    @property
    def waiting(self) -> int:
        """Requests that no step has begun."""
        return self.scheduler.waiting

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end an answer."""
        return tuple(self.config.end_tokens)

    def check(self, request: Request) -> None:
        """Raises DataError for a request that can never run."""
        check(request, self.config.vocabulary, self.max_length, self.adapters, self.tokenizer is not None)

    def compile(self, request: Request) -> Matcher | None:
        """The matcher of a request with a grammar, else None. Any thread may call it. Raises as `Grammars.compile`."""
        grammar = request.sampling.grammar
        return self._grammars.compile(grammar) if grammar and self._grammars else None

    def add(self, request: Request, matcher: Matcher | None = None) -> None:
        """Queues a request, with what `compile` made of its grammar or else compiling it now.

        Raises DataError when it can never run, ResourceError when too many wait.
        """
        self.check(request)
        if request.id in self._sequences:
            raise DataError(f"request {request.id} is already running", place="id", mend="use another id")
        free = self.scheduler.slots.count - self.scheduler.slots.used
        if self.scheduler.waiting >= self.options.max_waiting + free:
            raise ResourceError("too many requests are waiting", place="engine", mend="try again later")
        p, adapter = request.sampling, self.adapters[request.adapter] if request.adapter else None
        matcher = matcher or self.compile(request)
        self._arrivals += 1
        sequence = Sequence(
            request=request,
            arrival=self._arrivals,
            arrived=time.monotonic(),
            tokens=list(request.prompt),
            seed=secrets.randbits(63) if p.seed is None else p.seed,
            limit=min(p.max_tokens, self.max_length - len(request.prompt)),
            salt=adapter.salt if adapter else b"",
            adapter=adapter,
            matcher=matcher,
        )
        self._sequences[request.id] = sequence
        if self.tokenizer is not None and request.task == "generate" and (request.detokenize or p.stop):
            self._text[request.id] = Detokenizer(self.tokenizer, p.stop)
        self.scheduler.add(sequence)

    def abort(self, request_id: str) -> StepOutput | None:
        """Ends a request; None when it is not known (any more)."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return None
        self._totals.aborted += 1
        self._remove(sequence)
        return StepOutput((), finish="abort", weights=self.version, weights_first=self.version)

    def step(self) -> list[tuple[str, StepOutput]]:
        """Computes one step and returns what each advanced request gained; nothing while paused."""
        if self.paused:
            return []
        self._guess()
        plan = self.scheduler.schedule()
        for slot, stored in plan.loads:
            self._cache.load(slot, stored)
        if not plan.pieces:
            return []
        batch = lay_out(plan.pieces)
        hidden = self.decoder.forward(batch)
        self._totals.steps += 1
        self._totals.batch = len(plan.pieces)
        for piece in plan.pieces:
            known = piece.count - piece.guessed
            self._totals.prompt += max(0, min(piece.start + known, piece.sequence.prompt_length) - piece.start)
            piece.sequence.computed += known
        outputs = self._results(batch, hidden)
        for piece in plan.pieces:
            if piece.sequence.slot >= 0:
                self._save(piece.sequence)
        return outputs

    def _guess(self) -> None:
        """Drafts for sequences that are about to choose a token, when few enough run for it to pay."""
        running, options = self.scheduler.running, self.options.speculation
        if self.guesser is None or options is None:
            return
        for s in running:
            s.draft = ()
        able = [s for s in running if s.missing == 1 and s.matcher is None and not s.penalized]
        if not able or len(running) > options.max_running:
            return
        for sequence, draft in zip(able, self.guesser.guess(able), strict=True):
            # One token is chosen besides the guessed ones, and the answer must not outgrow its limit.
            sequence.draft = draft[: max(0, sequence.limit - sequence.generated - 1)]

    def _results(self, batch: StepBatch, hidden: Tensor) -> list[tuple[str, StepOutput]]:
        """What the wanted rows mean for their sequences."""
        rows: list[int] = []
        owners: list[Sequence] = []
        ahead: list[int] = []
        for span in batch.spans:
            if span.piece.last and span.piece.sequence.request.task == "generate":
                guessed = span.piece.guessed
                rows += range(span.last - 1 - guessed, span.last)
                owners += [span.piece.sequence] * (guessed + 1)
                ahead += range(guessed + 1)
        gather(self.decoder, batch, hidden)
        choices: list[Choice] = []
        if rows:
            chosen = hidden if len(rows) == len(hidden) else hidden[torch.tensor(rows, device=hidden.device)]
            choices = sample(self.decoder.logits(chosen), owners, ahead)
        outputs, at = [], 0
        for span in batch.spans:
            if not span.piece.last:
                continue
            sequence = span.piece.sequence
            if sequence.request.task != "generate":
                outputs.append((sequence.request.id, self._conclude(sequence)))
                continue
            mine = choices[at : at + span.piece.guessed + 1]
            at += len(mine)
            outputs.append((sequence.request.id, self._accept(sequence, mine)))
        return outputs

    def _conclude(self, sequence: Sequence) -> StepOutput:
        """The end of a request that asked for no answer."""
        vector: tuple[float, ...] = ()
        if sequence.request.task == "embed":
            vector = tuple(torch.nn.functional.normalize(sequence.pool, dim=0).tolist())
        self._save(sequence)
        self._totals.finished += 1
        self._remove(sequence)
        v, cached = self.version, sequence.cached
        return StepOutput(
            (), "", (), "stop", v, sequence.waited, "", v, tuple(sequence.scored), vector, cached
        )  # fmt: skip

    def _accept(self, sequence: Sequence, choices: list[Choice]) -> StepOutput:
        """Takes chosen tokens as far as the guesses they follow were right."""
        output = self._advance(sequence, choices[0])
        if len(choices) == 1:
            sequence.draft = ()
            return output
        draft, sequence.draft = sequence.draft, ()
        self._totals.drafted += len(choices) - 1
        for guess, before, choice in zip(draft, choices, choices[1:], strict=False):
            if output.finish is not None or before.token != guess:
                break
            self._totals.accepted += 1
            sequence.computed += 1
            output = output + self._advance(sequence, choice)
        return output

    def _advance(self, sequence: Sequence, choice: Choice) -> StepOutput:
        """Appends a chosen token, finds out whether the answer ends, and makes the output."""
        if choice.token < 0:
            self._remove(sequence)
            error = "the model produced numbers that are not finite"
            return StepOutput((), finish="error", weights=self.version, error=error)
        token, first = choice.token, sequence.generated == 0
        sequence.tokens.append(token)
        if sequence.penalized:
            sequence.output_counts[token] = sequence.output_counts.get(token, 0) + 1
        self._totals.output += 1
        text, finish = self._read(sequence, token)
        if finish is not None:
            self._save(sequence)
            self._totals.finished += 1
            self._remove(sequence)
        logprobs = (choice.logprob,) if choice.logprob is not None else ()
        scored = tuple(sequence.scored) if first else ()
        v, matcher = self.version, sequence.matcher
        error = f"{UNSATISFIED}: {matcher.error}" if finish == "error" and matcher is not None else ""
        return StepOutput((token,), text, logprobs, finish, v, sequence.waited, error, v, scored, (), sequence.cached)

    def _read(self, sequence: Sequence, token: int) -> tuple[str, Finish | None]:
        """Text that became certain with `token`, and why the answer ends with it, if it does."""
        p = sequence.request.sampling
        text = self._text.get(sequence.request.id)
        complete = sequence.matcher is not None and sequence.matcher.accept(token)
        if sequence.matcher is not None and sequence.matcher.error:
            return "", "error"
        ends = token in self.config.end_tokens and (sequence.matcher is not None or not p.ignore_eos)
        if token in p.stop_tokens or ends:
            return (text.flush() if text else ""), "stop"
        piece, stopped = text.push(token) if text else ("", False)
        if stopped:
            return piece, "stop"
        if complete or sequence.generated >= sequence.limit:
            return piece + (text.flush() if text else ""), "stop" if complete else "length"
        return piece, None

    def _save(self, sequence: Sequence) -> None:
        """Keeps the full blocks computed so far for requests with the same beginning."""
        fresh = self.scheduler.publish(sequence)
        if fresh:
            self._cache.save(sequence.slot, fresh)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.finish(sequence)
        del self._sequences[sequence.request.id]
        self._text.pop(sequence.request.id, None)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `protocol.Engine.update_weights`."""
        try:
            self.decoder.update(weights)
            self.version = version
        finally:  # whatever was replaced before an error makes cached keys and values wrong
            self.scheduler.recompute()

    def read_adapter(self, name: str, folder: str | Path) -> Adapter:
        """An adapter of this model, not loaded yet. Any thread may call it. Raises as `Engine.load_adapter`."""
        salt = f"{next(self._adapters_read)}:{name}".encode()
        return read_adapter(name, Path(folder), self.decoder.weights, salt)

    def load_adapter(self, name: str, folder: str | Path) -> None:
        """See `protocol.Engine.load_adapter`."""
        self.add_adapter(self.read_adapter(name, folder))

    def add_adapter(self, adapter: Adapter) -> None:
        """Lets requests name an adapter. Raises DataError for a name that is empty or taken."""
        if not adapter.name or adapter.name in self.adapters:
            raise DataError(f"adapter name {adapter.name!r} is empty or taken", place="adapter", mend="unload it first")
        if isinstance(self.decoder, PagedDecoder):
            self.decoder.adopt(adapter)
        self.adapters[adapter.name] = adapter

    def unload_adapter(self, name: str) -> None:
        """See `protocol.Engine.unload_adapter`."""
        if self.adapters.pop(name, None) is None:
            raise DataError(f"adapter {name!r} is not loaded", place="adapter", mend="load it first")

    def close(self) -> None:
        """Ends what the decoder started; the engine can do nothing afterwards."""
        if isinstance(self.decoder, PagedDecoder):
            self.decoder.close()

    def stats(self) -> EngineStats:
        """A snapshot; safe to call from another thread."""
        t, s, running = self._totals, self.scheduler, list(self.scheduler.running)
        return EngineStats(
            waiting=s.waiting,
            running=len(running),
            waiting_tokens=s.waiting_tokens,
            slots=s.slots.count,
            cached_tokens=sum(r.computed for r in running),
            cache_capacity=s.slots.count * self.max_length,
            prompt_tokens_total=t.prompt,
            output_tokens_total=t.output,
            steps_total=t.steps,
            finished_total=t.finished,
            aborted_total=t.aborted,
            last_batch=t.batch,
            weights=self.version,
            blocks=s.blocks.count,
            blocks_used=s.blocks.used,
            blocks_cached=s.blocks.idle,
            block_tokens=s.blocks.size,
            prefix_hit_tokens_total=s.hit_tokens,
            prefix_asked_tokens_total=s.asked_tokens,
            preempted_total=s.preempted,
            drafted_total=t.drafted,
            accepted_total=t.accepted,
            paused=self.paused,
            adapters=tuple(self.adapters),
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
