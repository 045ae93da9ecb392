"""What a replica does before it reports ready: every kernel is compiled and every kind of step has run once.

Without it the first request pays: the CPU kernels are compiled at their first call (up to a minute). Afterwards they
lie in Numba's cache on disk, where the next replica of this machine finds them.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from modelyard.engine.options import EngineOptions
from modelyard.engine.protocol import Engine
from modelyard.engine.request import Request, Sampling

CHUNK = 64
"""Tokens of the longest prompt of the warm-up: a chunk of a prefill, at little cost on a big model."""


def requests(engine: Engine, options: EngineOptions) -> list[Request]:
    """Two rounds' worth of small requests, of those the engine takes: a long and short prompts, greedy and sampled,
    with log-probabilities."""
    room = min(CHUNK, options.step_tokens or CHUNK, engine.max_length - 4)
    prompt = tuple(i % engine.vocabulary for i in range(max(1, room)))
    sampled = Sampling(max_tokens=3, temperature=0.7, top_p=0.9, top_k=8, seed=1, ignore_eos=True)
    plain = Sampling(max_tokens=3, temperature=0.0, ignore_eos=True)
    likely = Sampling(max_tokens=2, temperature=0.0, logprobs=1, presence_penalty=0.1, ignore_eos=True)
    short = prompt[: max(1, room // 8)]
    every = [
        Request("warm-long", prompt, plain, detokenize=False),
        Request("warm-sampled", short, sampled, detokenize=False),
        Request("warm-likely", short, likely, detokenize=False),
        Request("warm-embed", short, task="embed", detokenize=False),
    ]
    return [request for request in every if request.task in engine.tasks]


def warm_up(engine: Engine, options: EngineOptions) -> float:
    """Runs the warm-up to its end and returns its seconds.

    It blocks, whether or not the calling thread has an event loop. Raises what the engine raises.
    """
    started = time.perf_counter()
    with ThreadPoolExecutor(1, "warm-up") as thread:
        thread.submit(lambda: asyncio.run(_all(engine, options))).result()
    return time.perf_counter() - started


async def _all(engine: Engine, options: EngineOptions) -> None:
    async def once(request: Request) -> None:
        async for output in engine.submit(request):
            if output.finish == "error":
                raise RuntimeError(f"the warm-up failed: {output.error}")

    first, *rest = requests(engine, options)
    await once(first)  # alone: a step of one sequence
    room = min(len(rest), options.max_sequences + options.max_waiting)
    await asyncio.gather(*(once(request) for request in rest[:room]))
