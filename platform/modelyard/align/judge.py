"""A language model as judge: an OpenAI-compatible endpoint is asked for a number, within bounded time.

The judge reads what a policy wrote, and a policy can learn to write to the judge: watch lengths and samples, and mix it
with a rule.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from modelyard.align.answered import Answered, Failure, Value
from modelyard.align.reward_options import JudgeOptions
from modelyard.align.verifiers import numbers
from modelyard.errors import RecipeError

_AGAIN = (408, 409, 429)
_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_PLACE = re.compile(r"\{(prompt|answer|reference|lowest|highest)\}")


class Judge:
    """Asks for a score of every answer; a source of `rewards.RewardMix`.

    Raises:
        RecipeError: the environment variable of the key is not set.
    """

    def __init__(self, options: JudgeOptions) -> None:
        self._options = options
        self._headers = {"Authorization": f"Bearer {judge_key(options)}"} if options.key else {}

    def __call__(self, answers: Sequence[Answered]) -> list[Value]:
        """From 0 (`lowest`) to 1 (`highest`) an answer, or why there is no score. Takes at most
        (retries + 1) x (timeout + 30 s) for every `parallel` answers."""
        return asyncio.run(self._all(answers))

    def close(self) -> None:
        """Holds nothing between calls."""

    async def _all(self, answers: Sequence[Answered]) -> list[Value]:
        slots = asyncio.Semaphore(self._options.parallel)
        async with httpx.AsyncClient(headers=self._headers, timeout=self._options.timeout) as client:

            async def one(answer: Answered) -> Value:
                async with slots:
                    return await self._judge(client, answer)

            return list(await asyncio.gather(*(one(answer) for answer in answers)))

    async def _judge(self, client: httpx.AsyncClient, answer: Answered) -> Value:
        failure = Failure("")
        for attempt in range(self._options.retries + 1):
            pause = min(_LONGEST_PAUSE, _PAUSE * 2**attempt)
            try:
                # httpx bounds each read; this bounds the whole try against a server that trickles.
                response = await asyncio.wait_for(self._ask(client, answer), self._options.timeout)
            except TimeoutError:
                failure = Failure(f"the judge took longer than {self._options.timeout:g} s")
            except httpx.HTTPError as error:
                failure = Failure(f"the judge cannot be reached: {type(error).__name__} {error}".rstrip())
            else:
                if response.status_code == 200:
                    return self._read(response)
                failure = Failure(f"the judge answered {response.status_code}: {response.text[:200]}")
                if response.status_code not in _AGAIN and response.status_code < 500:
                    return failure
                pause = min(_LONGEST_PAUSE, _seconds(response.headers.get("retry-after"), pause))
            if attempt < self._options.retries:
                await asyncio.sleep(pause)
        return failure

    async def _ask(self, client: httpx.AsyncClient, answer: Answered) -> httpx.Response:
        options = self._options
        body = {
            "model": options.model,
            "messages": [{"role": "user", "content": filled(options, answer)}],
            "temperature": 0,
            "max_tokens": options.max_tokens,
        }
        return await client.post(options.url.rstrip("/") + "/chat/completions", json=body)

    def _read(self, response: httpx.Response) -> Value:
        try:
            text = str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError):
            return Failure(f"the judge's reply is no chat completion: {response.text[:200]}")
        return score(self._options, text)


def judge_key(options: JudgeOptions) -> str:
    """The API key. Raises RecipeError when its environment variable is not set."""
    key = os.environ.get(options.key or "")
    if not key:
        raise RecipeError(
            f"the environment variable {options.key} is not set",
            place="rollouts.rewards",
            mend="export it where the run starts, and on every node of a cluster",
        )
    return key


def score(options: JudgeOptions, text: str) -> Value:
    """The first number of a reply, as a share of the way from `lowest` to `highest`."""
    found = numbers(text)
    if not found:
        return Failure(f"the judge gave no number: {text[:80]!r}")
    if not options.lowest <= found[0] <= options.highest:
        return Failure(f"the judge's score {found[0]:g} is outside {options.lowest:g} to {options.highest:g}")
    return (found[0] - options.lowest) / (options.highest - options.lowest)


def filled(options: JudgeOptions, answer: Answered) -> str:
    """The instruction with its places filled, once: braces of prompts and answers stay as they are."""
    values = {
        "prompt": plain_prompt(answer), "answer": answer.text, "reference": str(answer.row.get("answer", "")),
        "lowest": f"{options.lowest:g}", "highest": f"{options.highest:g}",
    }  # fmt: skip
    return _PLACE.sub(lambda match: values[match[1]], options.instruction)


def plain_prompt(answer: Answered) -> str:
    """The prompt without the marks of a chat template, as far as the record has it so."""
    given: Any = answer.row.get("prompt", answer.row.get("messages", answer.row.get("question")))
    if isinstance(given, str):
        return given
    if isinstance(given, Sequence) and all(isinstance(m, Mapping) for m in given):
        return "\n\n".join(f"{m.get('role')}: {m.get('content')}" for m in given)
    return answer.prompt


def _seconds(header: str | None, otherwise: float) -> float:
    try:
        return max(0.0, float(header)) if header is not None else otherwise
    except ValueError:  # a date
        return otherwise
