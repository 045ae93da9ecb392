"""What it brings to send a request where its beginning, or its adapter, already is: two replicas, with and without.

    python tests/benchmarks/serve_affinity.py [--requests 160] [--groups 16]

Clients ask in random order with `groups` long beginnings (system prompts) and an end of their own. One replica's prefix
cache holds about two thirds of the beginnings. With affinity each replica computes its share of the beginnings once;
without it both need all of them, and keep throwing out what comes next. The second pair of rounds asks for `groups`
LoRA adapters of which a replica keeps half. Headline: time to the first token, median.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
from contract import report, say
from serve_models import LLAMA_32M, save_random_llama

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, launch
from modelyard.stages import session

CLIENTS, BEGINNING, END, TOKENS, BLOCK = 4, 512, 16, 4, 16
Body = Mapping[str, Any]


def prefix_bodies(groups: int, count: int) -> list[Body]:
    """Requests that begin in one of `groups` ways, in random order."""
    chance = random.Random(0)
    beginnings = [[chance.randrange(256, 16_000) for _ in range(BEGINNING)] for _ in range(groups)]
    return [
        {"model": "m", "prompt": chance.choice(beginnings) + [chance.randrange(256, 16_000) for _ in range(END)]}
        for _ in range(count)
    ]


def adapter_bodies(groups: int, count: int) -> list[Body]:
    """Requests for one of `groups` adapters each, in random order, with prompts that share nothing."""
    chance = random.Random(1)
    return [
        {"model": f"a{chance.randrange(groups)}", "prompt": [chance.randrange(256, 16_000) for _ in range(END)]}
        for _ in range(count)
    ]


async def load(url: str, bodies: list[Body]) -> list[float]:
    """Asks everything, CLIENTS at a time; seconds to the first token of each."""
    gate, firsts = asyncio.Semaphore(CLIENTS), list[float]()
    fixed = {"max_tokens": TOKENS, "temperature": 0, "stream": True}

    async def one(client: httpx.AsyncClient, body: Body) -> None:
        async with gate:
            started = time.perf_counter()
            async with client.stream("POST", f"{url}/v1/completions", json={**body, **fixed}) as response:
                response.raise_for_status()
                first = 0.0
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        first = first or time.perf_counter() - started
            firsts.append(first)

    async with httpx.AsyncClient(timeout=120) as client:
        await asyncio.gather(*(one(client, body) for body in bodies))
    return firsts


def serve(folder: str, options: ServeOptions, bodies: list[Body], *, affinity: bool) -> dict[str, float]:
    """One round on two fresh replicas: first-token quantiles in ms and the share of prompt tokens that were cached."""
    session.start(3)
    handle = launch(folder, "m", options.model_copy(update={"affinity": affinity}))
    try:
        firsts = sorted(asyncio.run(load(handle.url, bodies)))
        page = httpx.get(handle.url + "/metrics").text
    finally:
        handle.shutdown()
        session.stop()
    hits = next(float(line.split()[-1]) for line in page.splitlines() if line.startswith("modelyard_prefix_hit_ratio"))
    found = {
        "p50_ms": statistics.median(firsts) * 1e3, "p99_ms": firsts[int(len(firsts) * 0.99)] * 1e3,
        "mean_ms": statistics.fmean(firsts) * 1e3, "prefix_hits": hits,
    }  # fmt: skip
    say(f"  affinity {affinity}: {found}")
    return found


def save_adapters(folder: str, groups: int) -> dict[str, str]:
    """Random LoRA adapters of rank 8 on the attention of LLAMA_32M, in PEFT's form; name -> folder."""
    import torch
    from safetensors.torch import save_file

    hidden, found = LLAMA_32M["hidden_size"], {}
    for index in range(groups):
        place = Path(folder) / f"a{index}"
        place.mkdir()
        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight": torch.randn(shape) * 0.01
            for layer in range(LLAMA_32M["num_hidden_layers"])
            for module in ("q_proj", "o_proj")
            for side, shape in (("A", (8, hidden)), ("B", (hidden, 8)))
        }
        save_file(tensors, place / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "o_proj"]}
        (place / "adapter_config.json").write_text(json.dumps(config))
        found[place.name] = str(place)
    return found


def in_child(function: Callable[..., Any], *arguments: Any) -> None:
    """Runs a function that needs torch in a process of its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join()


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--groups", type=int, default=16)
    args = parser.parse_args()
    room = BEGINNING + END + TOKENS + BLOCK
    engine = EngineOptions(
        max_sequences=CLIENTS, threads=1, max_length=room, block_tokens=BLOCK,
        cache_tokens=CLIENTS * room + args.groups * BEGINNING * 2 // 3,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as shelf:
        in_child(save_random_llama, folder, LLAMA_32M)
        in_child(save_adapters, shelf, args.groups)
        options = ServeOptions(port=0, engine=engine, autoscaling=Autoscaling(min_replicas=2, max_replicas=2))
        asked = prefix_bodies(args.groups, args.requests)
        prefix = {mode: serve(folder, options, asked, affinity=mode) for mode in (False, True)}
        places = {f"a{index}": str(Path(shelf) / f"a{index}") for index in range(args.groups)}
        adapted = options.model_copy(update={"adapters": places, "max_adapters": args.groups // 2})
        asked = adapter_bodies(args.groups, args.requests)
        lora = {mode: serve(folder, adapted, asked, affinity=mode) for mode in (False, True)}
    report(
        "serve_affinity",
        unit="ms to the first token, median",
        ours=prefix[True]["p50_ms"],
        peer=prefix[False]["p50_ms"],
        peer_name="the same without affinity",
        target=0.9,
        better="less",
        prefix={"with": prefix[True], "without": prefix[False]},
        adapters={"with": lora[True], "without": lora[False]},
        requests=args.requests,
        groups=args.groups,
        clients=CLIENTS,
    )


if __name__ == "__main__":
    main()
