"""Sets of answers for the workers of a run, asked for ahead of training within a bound of staleness.

A pool is either every worker's own, or one for all: then rank 0 asks for everybody and hands out what came back.
The bound is one of admission: set n is begun with weights of version n - k at least, and version v is what v sets have
been trained on; so nothing is drawn in vain (AReaL, arXiv 2505.24298, section 5.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xxhash

from modelyard.align.options import RolloutOptions
from modelyard.align.pool import Ask, Pool
from modelyard.align.samples import Drawn, Prompt, Sample
from modelyard.align.weights import Change, Weights, policy_weights
from modelyard.engine import Sampling
from modelyard.tokens import rank_slice
from modelyard.train.parallel.strategy import Strategy


@dataclass
class _Batch:
    """Prompts asked for together: those of this worker, and where it asks the pool, the asks and what has come."""

    prompts: list[Prompt]
    asks: dict[str, Ask] = field(default_factory=dict)
    found: dict[str, list[Drawn]] = field(default_factory=dict)


class Supply:
    """Answers for this worker. All workers call its methods together.

    Args:
        pool: this worker's own, or the shared one; None on workers that rank 0 asks for.
        strategy: the policy in training.
        options: how to sample.
        seed: of the run.
    """

    def __init__(self, pool: Pool | None, strategy: Strategy, options: RolloutOptions, seed: int) -> None:
        self._pool, self._strategy, self._options, self._seed = pool, strategy, options, seed
        self.handed = 0
        """Bytes of weights that the last update handed over."""
        self._batches: dict[str, _Batch] = {}
        self._names: dict[str, str] = {}

    @property
    def shared(self) -> bool:
        """Whether one pool serves all workers."""
        return self._pool is None or self._pool.shared

    def update(self, version: int) -> None:
        """Gives the engines the policy as it is."""
        self.handed = 0
        weights = self._counted(policy_weights(self._strategy.model, changed_only=True))
        if not self.shared:
            assert self._pool is not None
            self._pool.update_weights(weights, version)
            return
        # Every worker gathers all shards before rank 0 sends: a send between two gathers can lock up.
        everything = []
        for name, value in weights:
            if self._pool is not None:
                everything.append((name, value.cpu()))
        if self._pool is not None:
            self._pool.update_weights(everything, version)

    def _counted(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor | Change]]:
        for name, value in weights:
            self.handed += value.nbytes
            yield name, value

    def asked(self, name: str) -> bool:
        """Whether this batch has been asked for and not been taken."""
        return name in self._batches

    def ask(self, name: str, prompts: Sequence[Prompt], draw: int, answers: int, temperature: float,
            least: int = 0, priority: int = 0) -> None:  # fmt: skip
        """Asks for `answers` to each of the prompts of all workers.

        Args:
            name: of the batch.
            prompts: all of them, the same on every worker.
            draw: with the run's seed and the prompt decides the draws.
            answers: to each.
            temperature: 0 = greedy.
            least: oldest version of the weights that may begin them.
            priority: smaller goes first.
        """
        share = rank_slice(np.arange(len(prompts)), self._strategy.reader, self._strategy.readers)
        batch = self._batches[name] = _Batch([prompts[i] for i in share])
        if self._pool is None:
            return
        stop = self._options.environment.stop if self._options.environment is not None else ()
        for place in range(len(prompts)) if self.shared else share.tolist():
            prompt = prompts[place]
            seed = xxhash.xxh3_64_intdigest(f"{self._seed}/{draw}/{prompt.ids}".encode()) >> 2
            sampling = Sampling(self._options.max_tokens, temperature, seed=seed, stop=stop, logprobs=0)
            ask = Ask(f"{name}-{place}", prompt, sampling, answers, least, priority)
            batch.asks[ask.name], self._names[ask.name] = ask, name
        self._pool.submit(list(batch.asks.values()))

    def take(self, name: str) -> list[Sample]:
        """This worker's answers of a batch, in order, group by group; waits for the whole batch, so that short answers
        are not preferred."""
        batch = self._batches[name]
        while len(batch.found) < len(batch.asks):
            self._wait()
        found = [batch.found[each] for each in batch.asks]
        if self.shared:
            everything: list[list[Drawn]] = self._strategy.world.gather(found if self._pool is not None else None)[0]
            share = rank_slice(np.arange(len(everything)), self._strategy.reader, self._strategy.readers)
            found = [everything[i] for i in share]
        del self._batches[name]
        return [Sample(d.prompt or p, d) for p, group in zip(batch.prompts, found, strict=True) for d in group]

    def agrees(self, mine: bool) -> bool:
        """Whether any worker says yes, where they have one pool and must ask it together; else what this one says."""
        return any(self._strategy.world.gather(mine)) if self.shared else mine

    def forget(self) -> None:
        """Drops everything asked for: training starts, or goes back to a checkpoint."""
        if self._pool is not None and self._batches:
            self._pool.clear()
        self._batches, self._names = {}, {}

    def _wait(self) -> None:
        """Takes in what has been answered; what was begun with weights that are too old is asked for again."""
        assert self._pool is not None
        for name, group in self._pool.results():
            batch = self._batches[self._names[name]]
            ask = batch.asks[name]
            if min(each.first for each in group) < ask.least:
                self._pool.submit([ask])
            else:
                batch.found[name] = group
                del self._names[name]
