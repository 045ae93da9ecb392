"""What Ray Serve costs: the same application and engine under Serve and under bare uvicorn, 16 streams at once.

    python tests/benchmarks/serve_overhead.py [--requests 96] [--repeats 3] [--haproxy]

Both sides serve one random Llama of 32 M parameters with one torch thread to the same client process. Headline: tokens
a second streamed. `cpu_us_a_chunk` is what a streamed chunk costs in CPU beyond bare uvicorn, over all threads of the
process tree but the busiest: that is the engine's step, the same on both sides, and its noise is larger than what is
measured. Ray's processes also work when nobody asks: that is measured apart, told as `idle_cores`, and taken off.
Under Serve ingress and engine are processes of their own, so on several cores the ratio may exceed one.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from glob import glob
from pathlib import Path
from typing import Any

import httpx
import ray
from contract import clock, report, say, tree
from serve_models import LLAMA_32M, save_random_llama

from modelyard.engine import EngineOptions
from modelyard.serving import ServeOptions, launch
from modelyard.serving.keys import add_key
from modelyard.serving.server import free_port
from modelyard.stages import session

STREAMS = 16
TOKENS = 64
IDLE_SECONDS = 10
ENGINE = EngineOptions(max_sequences=STREAMS, threads=1, max_length=512)


def bare(folder: str, port: int) -> None:
    """The application under uvicorn with the engine in the same process."""
    import uvicorn

    from modelyard.engine import NativeEngine, Tokenizer
    from modelyard.serving.api import build_app
    from modelyard.serving.backend import LocalBackend
    from modelyard.serving.metrics import Metrics
    from modelyard.serving.service import Service

    engine = NativeEngine(folder, ENGINE)
    service = Service(
        "m",
        Tokenizer(Path(folder)),
        LocalBackend(engine),
        max_length=engine.max_length,
        max_choices=1,
        timeout=600,
        metrics=Metrics(),
    )
    uvicorn.run(build_app(service, keys=None, max_body=1_000_000), port=port, log_level="error")


async def load(url: str, requests: int, headers: dict[str, str]) -> dict[str, float]:
    """Streams `requests` answers, STREAMS at a time; tokens/s, and p50 and p99 of the first token in ms."""
    gate, firsts, chunks = asyncio.Semaphore(STREAMS), [], 0
    body = {"model": "m", "prompt": "a short text " * 8, "max_tokens": TOKENS, "temperature": 0, "stream": True}

    async def one(client: httpx.AsyncClient) -> None:
        nonlocal chunks
        async with gate:
            started, first = time.perf_counter(), 0.0
            async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunks += 1
                        first = first or time.perf_counter() - started
            firsts.append(first)

    started = time.perf_counter()
    limits = httpx.Limits(max_connections=STREAMS)
    async with httpx.AsyncClient(timeout=120, limits=limits, headers=headers) as client:
        await asyncio.gather(*(one(client) for _ in range(requests)))
    seconds = time.perf_counter() - started
    firsts.sort()
    return {
        "tokens_per_second": requests * TOKENS / seconds,
        "requests_per_second": requests / seconds,
        "seconds": seconds,
        "chunks": chunks,
        "first_p50_ms": firsts[len(firsts) // 2] * 1e3,
        "first_p99_ms": firsts[int(len(firsts) * 0.99)] * 1e3,
    }


def thread_seconds() -> dict[tuple[int, str], float]:
    """CPU seconds of every living thread of the process tree, by process and thread."""
    found = {}
    for process in tree():
        for place in glob(f"/proc/{process.pid}/task/*/stat"):
            with suppress(OSError):
                user, system = Path(place).read_text().rpartition(")")[2].split()[11:13]
                found[process.pid, place] = (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return found


def _gained(before: dict[tuple[int, str], float], after: dict[tuple[int, str], float]) -> list[float]:
    return [seconds - before.get(thread, 0.0) for thread, seconds in after.items()]


def rounds(
    name: str, url: str, requests: int, repeats: int, headers: dict[str, str] | None = None
) -> list[dict[str, float]]:
    """Repeated loads after a warm-up, with the CPU seconds of the process tree."""
    asyncio.run(load(url, STREAMS, headers or {}))
    time.sleep(3)  # what ends with the load has ended
    before = thread_seconds()
    time.sleep(IDLE_SECONDS)
    idle, found = sum(_gained(before, thread_seconds())) / IDLE_SECONDS, []
    say(f"  {name}: {idle:.3f} cores when idle")
    for _ in range(repeats):
        before = thread_seconds()
        with clock() as spent:
            result = asyncio.run(load(url, requests, headers or {}))
        busy = _gained(before, thread_seconds())
        besides = sum(busy) - max(busy) - idle * result["seconds"]
        found.append(result | {"cpu": spent.cpu, "besides": besides, "idle": idle})
        say(f"  {name}: {result['tokens_per_second']:.0f} tokens/s, {spent.cpu:.1f} CPU s, {besides:.2f} besides the "
            f"engine, first token p50 {result['first_p50_ms']:.0f} ms")  # fmt: skip
    return found


def on_uvicorn(folder: str, run: Callable[[str], Any]) -> Any:
    """Runs `run(url)` against the bare application."""
    port = free_port()
    process = multiprocessing.get_context("spawn").Process(target=bare, args=(folder, port), daemon=True)
    process.start()
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/healthz")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        return run(url)
    finally:
        process.terminate()
        process.join()


def on_serve(folder: str, run: Callable[[str, dict[str, str]], Any], *, haproxy: bool) -> Any:
    """Runs `run(url, headers)` against the application on Ray Serve."""
    session.start(2)
    keys = None
    if haproxy:
        keys = str(Path(folder) / "keys.txt")
        add_key(Path(keys), "benchmark")
    handle = launch(folder, "m", ServeOptions(port=0, engine=ENGINE, haproxy=haproxy, api_keys=keys))
    say(f"  serve answers after {handle.seconds:.1f} s")
    try:
        return run(handle.url, handle.headers)
    finally:
        handle.shutdown()
        session.stop()
        assert not ray.is_initialized()


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--haproxy", action="store_true", help="HAProxy in front, as beyond loopback (with a key)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(target=save_random_llama, args=(folder, LLAMA_32M))
        maker.start()
        maker.join()
        peer = on_uvicorn(folder, lambda url: rounds("uvicorn", url, args.requests, args.repeats))
        ours = on_serve(
            folder,
            lambda url, headers: rounds("serve", url, args.requests, args.repeats, headers),
            haproxy=args.haproxy,
        )

    def median(side: list[dict[str, float]], key: str) -> float:
        return statistics.median(r[key] for r in side)

    chunks = median(ours, "chunks")
    report(
        "serve_overhead",
        unit="tokens/s",
        ours=median(ours, "tokens_per_second"),
        peer=median(peer, "tokens_per_second"),
        peer_name="bare uvicorn, engine in process",
        target=0.85,
        streams=STREAMS,
        haproxy=args.haproxy,
        requests_per_second=median(ours, "requests_per_second"),
        cpu_us_a_chunk=(median(ours, "besides") / chunks - median(peer, "besides") / median(peer, "chunks")) * 1e6,
        cpu_ratio=median(ours, "cpu") / median(peer, "cpu"),
        idle_cores={"serve": median(ours, "idle"), "uvicorn": median(peer, "idle")},
        first_token_ms={
            side: {p: median(rows, f"first_{p}_ms") for p in ("p50", "p99")}
            for side, rows in (("serve", ours), ("uvicorn", peer))
        },
    )


if __name__ == "__main__":
    main()
