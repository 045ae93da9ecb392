"""What clients notice when replicas die: 64 of them ask without a pause while a replica is killed every 30 s.

    python tests/benchmarks/serve_faults.py [--seconds 300] [--every 30] [--clients 64] [--replicas 2]

Half of the clients stream. Every prompt's greedy answer is known from before the first kill. An answer is lost when it
is refused, broken before its first token, or ends without its end; it is wrong when any of its text differs from what
is known. A stream that had begun on the killed replica may end with an error event: those are counted apart, and what
they had sent must be right. `recovery_s` is the longest time from a kill until all replicas answered again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import random
import tempfile
import time
from collections import Counter

import httpx
import psutil
from contract import report, say
from serve_models import save_random_llama

from modelyard.engine import EngineOptions
from modelyard.serving import Autoscaling, ServeOptions, launch
from modelyard.stages import session

TOKENS, PROMPTS = 24, 16
SHAPE = {
    "vocab_size": 2048, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def body(prompt: int, *, stream: bool) -> dict[str, object]:
    """A request whose answer is always the same."""
    text = f"a short text number {prompt} " * 4
    return {"model": "m", "prompt": text, "max_tokens": TOKENS, "temperature": 0, "stream": stream}


async def ask(client: httpx.AsyncClient, prompt: int, known: dict[int, str], *, stream: bool) -> str:
    """One request and what became of it: `right`, `begun` (a clean error after the first token), or what is wrong."""
    try:
        if not stream:
            answer = await client.post("/v1/completions", json=body(prompt, stream=False))
            if answer.status_code != 200:
                return f"lost: {answer.status_code}"
            text = answer.json()["choices"][0]["text"]
            if text == known[prompt]:
                return "right"
            say(f"  wrong, whole: {prompt} {answer.json()!r} is not {known[prompt]!r}")
            return "wrong"
        text, ended, failed = "", False, False
        async with client.stream("POST", "/v1/completions", json=body(prompt, stream=True)) as answer:
            if answer.status_code != 200:
                return f"lost: {answer.status_code}"
            async for line in answer.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    failed = failed or "error" in event
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
    except httpx.HTTPError as error:
        return f"lost: {type(error).__name__}"
    if not known[prompt].startswith(text) or (not failed and ended and text != known[prompt]):
        say(f"  wrong, stream: {prompt} {text!r} is not {known[prompt]!r}; failed {failed} ended {ended}")
        return "wrong"
    if failed:
        return "begun" if text and ended else "lost: error before the first token"
    return "right" if ended else "lost: no end"


async def hammer(url: str, clients: int, seconds: float, known: dict[int, str], found: Counter[str]) -> None:
    """Closed loop of `clients` until `seconds` are over."""
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)

    async def one(client: httpx.AsyncClient, number: int) -> None:
        chance = random.Random(number)
        while time.monotonic() < until:
            found[await ask(client, chance.randrange(PROMPTS), known, stream=number % 2 == 0)] += 1

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(one(client, number) for number in range(clients)))


async def assassinate(url: str, every: float, seconds: float, replicas: int) -> list[float]:
    """Kills a replica every so often; seconds until all replicas answered again, a kill."""
    recovered, started = [], time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        for due in range(1, int(seconds / every)):  # none so late that its effect would not be seen
            await asyncio.sleep(started + due * every - time.monotonic())
            victims = engines()
            random.choice(victims).kill()
            killed = time.monotonic()
            say(f"  killed one of {len(victims)} replicas")
            await asyncio.sleep(1.0)  # the count below still holds the dead one for a moment
            while len(engines()) < replicas or f"modelyard_replicas {replicas:.1f}" not in await page(client):
                await asyncio.sleep(0.5)
            recovered.append(time.monotonic() - killed)
            say(f"  all replicas answer again after {recovered[-1]:.1f} s")
    return recovered


async def page(client: httpx.AsyncClient) -> str:
    """The metrics, empty when they cannot be had."""
    try:
        return (await client.get("/metrics")).text
    except httpx.HTTPError:
        return ""


def engines() -> list[psutil.Process]:
    """Processes of this benchmark's engine replicas."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::ServeReplica:") and ":engine" in title:
            found.append(process)
    return found


async def measure(url: str, args: argparse.Namespace) -> tuple[Counter[str], list[float]]:
    """The load and the kills side by side."""
    known: dict[int, str] = {}
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        for prompt in range(PROMPTS):
            answer = await client.post("/v1/completions", json=body(prompt, stream=False))
            known[prompt] = answer.json()["choices"][0]["text"]
    found: Counter[str] = Counter()
    kills = asyncio.create_task(assassinate(url, args.every, args.seconds, args.replicas))
    await hammer(url, args.clients, args.seconds, known, found)
    return found, await kills


def main() -> None:
    """Measures and reports."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--every", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--replicas", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        maker = multiprocessing.get_context("spawn").Process(target=save_random_llama, args=(folder, SHAPE))
        maker.start()
        maker.join()
        session.start(args.replicas + 1)
        options = ServeOptions(
            port=0,
            engine=EngineOptions(max_sequences=args.clients, threads=1, max_length=512),
            autoscaling=Autoscaling(min_replicas=args.replicas, max_replicas=args.replicas),
        )
        handle = launch(folder, "m", options)
        say(f"  {args.replicas} replicas answer after {handle.seconds:.1f} s")
        try:
            found, recovered = asyncio.run(measure(handle.url, args))
        finally:
            handle.shutdown()
            session.stop()
    offered = sum(found.values())
    lost = sum(count for kind, count in found.items() if kind.startswith("lost"))
    report(
        "serve_faults",
        unit="requests lost or wrong",
        ours=lost + found["wrong"],
        peer=offered,
        peer_name="requests offered",
        target=0.0,
        better="less",
        offered=offered,
        lost=lost,
        wrong=found["wrong"],
        begun_streams_ended_by_an_error=found["begun"],
        kinds=dict(found),
        kills=len(recovered),
        recovery_s=max(recovered, default=0.0),
        clients=args.clients,
        seconds=args.seconds,
    )


if __name__ == "__main__":
    main()
