"""An answer in the making: what the policy wrote turn by turn, and what it was told in between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from modelyard.align.samples import Drawn, Prompt
from modelyard.engine import Request, StepOutput
from modelyard.errors import DataError

_TURN_SEEDS = 1_000_003
"""Between the seeds of an answer's turns: those of a group's answers are one apart."""


class Episode:
    """One answer. Token ids are only ever appended: what the policy wrote is never tokenized again.

    Args:
        prompt: what is answered.
        request: for its first turn.
    """

    def __init__(self, prompt: Prompt, request: Request) -> None:
        self.prompt, self.request, self._asked = prompt, request, prompt
        self.texts: list[str] = []
        self.earned, self.failure = 0.0, ""
        self._first_request, self._output = request, StepOutput(())
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._learnt: list[bool] = []
        self._versions: list[int] = []

    def ask(self, prompt: Prompt) -> None:
        """Puts another prompt in the place of the one that was to be answered, before anything is written."""
        self.prompt = prompt
        self.request = self._first_request = replace(self.request, prompt=prompt.ids)

    @property
    def turn(self) -> int:
        """Which turn has just ended, 0-based."""
        return (len(self.texts) - 1) // 2

    def take(self, output: StepOutput) -> bool:
        """Appends what was written; whether the turn has ended with it.

        Raises:
            DataError: the engine failed.
        """
        self._output = self._output + output if self._output.tokens else output
        if self._output.finish is None:
            return False
        if self._output.finish == "error":
            raise DataError(f"the engine failed: {self._output.error}", place=self.prompt.place)
        written = self._output
        self._tokens += written.tokens
        self._logprobs += [t.logprob for t in written.logprobs]
        self._learnt += [True] * len(written.tokens)
        self._versions += [written.weights_first, written.weights]
        self.texts.append(written.text)
        return True

    @property
    def text(self) -> str:
        """What the last turn says."""
        return self.texts[-1]

    @property
    def tokens(self) -> list[int]:
        """All that was written and told."""
        return self._tokens

    @property
    def before(self) -> list[int]:
        """What was written and told before the last turn."""
        return self._tokens[: len(self._tokens) - len(self._output.tokens)]

    @property
    def stopped(self) -> bool:
        """Whether the last turn ended by itself, not at the greatest length."""
        return self._output.finish == "stop"

    @property
    def last(self) -> int:
        """The last token of the turn that has ended."""
        return self._tokens[-1]

    @property
    def room(self) -> int:
        """Tokens it may still write."""
        return self._first_request.sampling.max_tokens - sum(self._learnt)

    def tell(self, text: str, ids: Sequence[int]) -> Request:
        """Appends an observation; the request for the next turn."""
        self.texts.append(text)
        self._tokens += ids
        self._logprobs += [0.0] * len(ids)
        self._learnt += [False] * len(ids)
        first, turn = self._first_request, len(self.texts) // 2
        seed = first.sampling.seed
        sampling = replace(
            first.sampling, max_tokens=self.room, seed=None if seed is None else seed + turn * _TURN_SEEDS
        )
        self._output = StepOutput(())
        self.request = replace(
            first, id=f"{first.id}-t{turn}", prompt=(*first.prompt, *self._tokens), sampling=sampling
        )
        return self.request

    def drawn(self, text: str) -> Drawn:
        """The answer as it is; `text` is what rewards read."""
        many = len(self.texts) > 1
        return Drawn(
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            text=text,
            ended=self.stopped,
            version=self._versions[-1],
            first=self._versions[0],
            learnt=tuple(self._learnt) if many else (),
            turns=tuple(self.texts) if many else (),
            earned=self.earned,
            failure=self.failure,
            prompt=self.prompt if self.prompt is not self._asked else None,
        )
