"""What answers are told while they are written: tools, a simulated user, a game, by a function of the user's own.

The function runs in a process apart (`function_process`), asked from a thread, so that engines go on with the other
answers meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelyard.align.encode import TEMPLATES
from modelyard.align.function_process import FunctionFailed, FunctionProcess
from modelyard.align.options import EnvironmentOptions, TemplateName
from modelyard.align.records import task
from modelyard.align.samples import Prompt
from modelyard.engine import Tokenizer
from modelyard.errors import DataError


@dataclass(frozen=True)
class Telling:
    """How answers are told something: the environment; for `form: chat` the token ids that the chat template puts
    before an observation, the end of the answer's turn first, and behind it up to the next answer; and the template."""

    options: EnvironmentOptions
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    template: TemplateName = "own"

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

    Args:
        telling: what is told how.
        model: folder with the tokenizer.

    Raises:
        RecipeError: it cannot be imported.
        DataError: the folder has no tokenizer.
    """

    def __init__(self, telling: Telling, model: Path) -> None:
        self.telling, self._tokenizer = telling, Tokenizer(model)
        if telling.template != "own":
            self._tokenizer.template = TEMPLATES[telling.template]
        options = telling.options
        self._process = FunctionProcess(options.function, options.timeout, "rollouts.environment.function")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="environment")

    @property
    def resets(self) -> bool:
        """Whether episodes begin with a reset: the environment is a class."""
        return self._process.is_class

    def encode(self, text: str) -> list[int]:
        """Token ids of an observation."""
        return self._tokenizer.encode(text, special=False)

    def reset(self, episode: str, prompt: Prompt) -> Future[Prompt]:
        """Begins an episode; the prompt to answer in it. The result raises FunctionFailed."""
        return self._thread.submit(self._reset, {"episode": episode, "row": dict(prompt.row)}, prompt)

    def _reset(self, message: dict[str, Any], prompt: Prompt) -> Prompt:
        given = self._process.call(message)["prompt"]
        if given is None:
            return prompt
        try:
            text = self._tokenizer.render(task({"prompt": given}, prompt.place).prompt)
        except DataError as error:
            raise FunctionFailed(f"{self.telling.options.function} reset to no prompt: {error}") from error
        return replace(prompt, ids=tuple(self._tokenizer.encode(text, special=False)), text=text)

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
