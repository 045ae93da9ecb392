"""What the tests of serving ask, and by what client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil

MINUTES = 180.0
"""Seconds anything may take before a test gives it up: long, because the machine may be busy with other tests."""
# One client for all: each new one reads the certificates of the world, 40 ms. And httpx' own limit is 5 s.
HTTP = httpx.Client(timeout=MINUTES, limits=httpx.Limits(max_connections=100))

MESSAGES: list[Any] = [{"role": "user", "content": "hello"}]
CHAT: dict[str, Any] = {"model": "tiny", "messages": MESSAGES}
SHORT: dict[str, Any] = CHAT | {"max_tokens": 8, "temperature": 0}
ENDLESS: dict[str, Any] = {"logit_bias": {"1": -100}}
"""Added to a request: its answer goes on to its greatest length, because the end token is out of reach."""
SECRET = "whsec_" + "A" * 43 + "="
"""What webhooks are signed with."""


def until_refused(ask: Callable[[], httpx.Response], callers: int) -> list[httpx.Response]:
    """The answers to callers that ask side by side, again and again, until one of them is refused."""
    refused = threading.Event()

    def call(_: int) -> list[httpx.Response]:
        answers, deadline = list[httpx.Response](), time.monotonic() + MINUTES
        while not refused.is_set() and time.monotonic() < deadline:
            answers.append(ask())
            if answers[-1].status_code == 429:
                refused.set()
        return answers

    with ThreadPoolExecutor(callers) as pool:
        return [answer for answers in pool.map(call, range(callers)) for answer in answers]


def replica_processes() -> list[psutil.Process]:
    """The engine replicas of this test's Ray."""

    def title(process: psutil.Process) -> str:
        try:
            return " ".join(process.cmdline())
        except psutil.Error:
            return ""

    named = [(process, title(process)) for process in psutil.Process().children(recursive=True)]
    return [p for p, name in named if name.startswith("ray::ServeReplica:") and ":engine" in name]


def wait_for(done: Callable[[], Any], what: str, every: float = 0.02) -> Any:
    """What `done` returns once it is true; fails after some minutes and says `what` did not come."""
    deadline = time.monotonic() + MINUTES
    while time.monotonic() < deadline:
        if found := done():
            return found
        time.sleep(every)
    raise AssertionError(f"{what}: not within {MINUTES:.0f} s")
