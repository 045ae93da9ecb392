"""Pre-training whose batches Ray Data reads: tasks anywhere in the cluster fetch sequences, workers take them in order.

The order is the one that a worker reading by itself would keep, a function of (seed, step); every worker has a data set
of its own that begins at the step it is at. So a resumed run, on any number of workers, goes on at the next batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from modelyard.tokens import TokenDataset, rank_slice
from modelyard.train.hooks import Hooks
from modelyard.train.options import TrainOptions

if TYPE_CHECKING:
    import torch

    from modelyard.train.data import Batches
    from modelyard.train.loop import Outcome
    from modelyard.train.metrics import Say, Sink
    from modelyard.train.parallel.strategy import Strategy
    from modelyard.train.programs import PretrainJob
    from modelyard.train.world import World

_TASK_BYTES = 8 << 20
"""About what one task reads: few enough tasks for long runs, few enough bytes to keep several ahead of training."""
_TASK_STEPS = 64
_TASKS = 2
"""Tasks of one worker at a time. They ask for no CPU: training workers hold all of those."""


def pretrain(job: PretrainJob, world: World, sink: Sink, say: Say, hooks: Hooks | None) -> Outcome:
    """`train.programs.pretrain` on batches from Ray Data."""
    from modelyard.stages.remote import plain_errors
    from modelyard.train import programs

    with plain_errors():
        return programs.pretrain(job, world, sink, say, hooks, ray_batches)


def ray_batches(data: TokenDataset, options: TrainOptions, strategy: Strategy) -> Callable[[int], Batches]:
    """What makes the batches of one worker from a step on."""
    from modelyard.train.data import StreamFeed

    share, micro = (strategy.reader, strategy.readers), strategy.micro_batch or options.micro_batch
    reader = StepReader(data, options, *share)
    steps = options.total_steps(len(data), data.sequence_length)

    def rows(first: int) -> Iterator[Mapping[str, torch.Tensor]]:
        return _rows(reader, range(first, steps), -(-options.global_batch // share[1]))

    return lambda _: StreamFeed(rows, options.batches.size, micro, *share, strategy.world.device)


class StepReader:
    """Runs in a task: one reader's sequences of some steps, in order."""

    def __init__(self, data: TokenDataset, options: TrainOptions, reader: int, readers: int) -> None:
        self.data, self.options, self.reader, self.readers = data, options, reader, readers

    def __call__(self, block: Mapping[str, Any]) -> dict[str, Any]:
        """`input_ids` int32 and `document_ids` int32 [n, L] of the steps `item` [k]."""
        from modelyard.train.data import make_order

        order = make_order(self.data, self.options)
        mine = [rank_slice(order(int(step)), self.reader, self.readers) for step in block["item"]]
        arrays = self.data.batch(np.concatenate(mine))
        return {name: array.astype(np.int32) for name, array in arrays.items()}


def _rows(reader: StepReader, steps: range, batch: int) -> Iterator[Mapping[str, torch.Tensor]]:
    import ray
    import torch

    from modelyard.stages.remote import quiet_ray_data

    quiet_ray_data()
    each = _TASK_BYTES // (batch * reader.data.sequence_length * 8)
    blocks = -(-len(steps) // min(_TASK_STEPS, max(1, each)))
    data = ray.data.from_items(list(steps), override_num_blocks=blocks)
    data.context.execution_options.preserve_order = True
    read = data.map_batches(reader, batch_size=None, num_cpus=0, concurrency=_TASKS)
    for rows in read.iter_torch_batches(batch_size=batch, dtypes=torch.int64, device="cpu"):
        yield {"input_ids": rows["input_ids"], "document_ids": rows["document_ids"].int()}
