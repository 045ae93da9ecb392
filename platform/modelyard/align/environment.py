"""What answers are told while they are written: tools, a simulated user, a game, by a function of the user's own.

The function runs in a process apart (`function_process`), asked from a thread, so that engines go on with the other
answers meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from modelyard.align.function_process import FunctionProcess
from modelyard.align.options import EnvironmentOptions


@dataclass(frozen=True)
class Telling:
    """How answers are told something: the environment, and for `form: chat` the token ids that the chat template puts
    before an observation, the end of the answer's turn first, and behind it up to the next answer."""

    options: EnvironmentOptions
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()

    @property
    def longest(self) -> int:
        """Tokens that an answer may be told in all."""
        return (self.options.turns - 1) * (self.options.observation_tokens + len(self.before) + len(self.after))

    def ids(self, observation: Sequence[int], last: int) -> tuple[int, ...]:
        """What is appended to an answer whose turn ended with the token `last`: not the end of the turn once more."""
        told = tuple(observation[: self.options.observation_tokens])
        if self.options.form == "plain":
            return told
        written = bool(self.before) and self.before[0] == last
        return (*self.before[int(written) :], *told, *self.after)


@dataclass(frozen=True)
class Told:
    """What an environment says to a turn: an observation, or None at the end; and what the turn earned."""

    observation: str | None
    reward: float


class Environment:
    """Runs the environment of one pool, one call at a time, without waiting.

    Raises:
        RecipeError: it cannot be imported.
    """

    def __init__(self, telling: Telling, encode: Callable[[str], list[int]]) -> None:
        self.telling, self.encode = telling, encode
        options = telling.options
        self._process = FunctionProcess(options.function, options.timeout, "rollouts.environment.function")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")

    def ask(self, episode: str, turn: int, prompt: str, answer: str, row: Mapping[str, Any]) -> Future[Told]:
        """What it says to turn `turn` (0-based) of an episode; the result raises FunctionFailed."""
        message = {"episode": episode, "first": turn == 0, "last": turn + 1 == self.telling.options.turns,
                   "prompt": prompt, "completion": answer, "row": dict(row)}  # fmt: skip
        return self._thread.submit(self._ask, message)

    def _ask(self, message: dict[str, Any]) -> Told:
        found = self._process.call(message)
        return Told(found["observation"], float(found["reward"]))

    def close(self) -> None:
        """Ends the process with the episodes it knows; another call starts a new one."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._process.close()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")
