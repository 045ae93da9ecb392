"""How long a model that was scaled to zero takes to its first token: 135 M parameters, warm page cache.

    python tests/benchmarks/serve_cold_start.py [--repeats 3]

A server with no replica is asked one question; measured is the time to its first token: Serve notices, a process
starts, imports, maps the weights, warms up, answers. Then the replica goes, and again. The first round, which also
compiles the CPU kernels when this machine has never run them, is told apart. Beside it stands the same engine started
in a fresh process without Ray.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time

import httpx
from contract import clock, report, say
from serve_models import LLAMA_135M, save_random_llama

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, launch
from modelyard.stages import session

TARGET_S = 8.0
ENGINE = EngineOptions(max_sequences=8, threads=1, max_length=1024)
BARE = """
import time; began = time.perf_counter()
import asyncio, json, sys
from modelyard.engine import EngineOptions, NativeEngine
from modelyard.serving.warm import warm_up
imported = time.perf_counter()
options = EngineOptions.model_validate_json(sys.argv[2])
engine = NativeEngine(sys.argv[1], options)
loaded = time.perf_counter()
warmed = warm_up(engine, options)
parts = {"import": imported - began, "load": loaded - imported, "warm_up": warmed}
print(json.dumps(parts | {"cpu": time.process_time()}))
"""


def first_token(url: str) -> float:
    """Seconds from the question to the first event with text."""
    body = {"model": "m", "prompt": "a short text", "max_tokens": 4, "temperature": 0, "stream": True}
    started = time.perf_counter()
    with httpx.stream("POST", url + "/v1/completions", json=body, timeout=300) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if line.startswith("data: {"):
                if "error" in json.loads(line[6:]):
                    raise RuntimeError(line)
                return time.perf_counter() - started
    raise RuntimeError("no event came")


def until_gone(url: str) -> None:
    """Waits until the last replica has ended."""
    deadline = time.monotonic() + 120
    while "modelyard_replicas 0.0" not in httpx.get(url + "/metrics").text:
        if time.monotonic() > deadline:
            raise RuntimeError("the replica does not go")
        time.sleep(0.5)


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(
            target=save_random_llama, args=(folder, LLAMA_135M, "bfloat16")
        )
        maker.start()
        maker.join()
        bare = []
        for _ in range(args.repeats + 1):
            command = [sys.executable, "-c", BARE, folder, ENGINE.model_dump_json()]
            bare.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
            say(f"  bare: {bare[-1]}")
        session.start(2)
        scaling = Autoscaling(min_replicas=0, max_replicas=1, downscale_delay_s=1.0)
        handle = launch(folder, "m", ServeOptions(port=0, engine=ENGINE, autoscaling=scaling))
        seconds, cpu = [], []
        try:
            for _ in range(args.repeats + 1):
                with clock() as spent:
                    seconds.append(first_token(handle.url))
                cpu.append(spent.cpu)
                say(f"  first token after {seconds[-1]:.1f} s, {cpu[-1]:.1f} CPU s")
                until_gone(handle.url)
        finally:
            handle.shutdown()
            session.stop()
    report(
        "serve_cold_start",
        unit="s to the first token",
        ours=statistics.median(seconds[1:]),
        peer=TARGET_S,
        peer_name="the bound",
        target=1.0,
        better="less",
        first_s=seconds[0],
        all_s=seconds[1:],
        cpu_s=statistics.median(cpu[1:]),
        without_ray_s={part: statistics.median(b[part] for b in bare[1:]) for part in bare[0]},  # cpu: of all threads
    )


if __name__ == "__main__":
    main()
