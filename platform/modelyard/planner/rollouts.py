"""What a set of answers costs in reinforcement learning: they are written, scored, and learnt from.

Everything is counted at its most: prompts and answers of the greatest length. What rewards cost that are no models
(rules, functions, judges) is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelyard.planner.architecture import parse
from modelyard.planner.flops import flops_per_token
from modelyard.planner.hardware import Hardware
from modelyard.planner.inference import rates
from modelyard.planner.memory import serving_memory
from modelyard.planner.parameters import count
from modelyard.planner.time import forward_seconds


@dataclass(frozen=True)
class AnswerSet:
    """One set of answers over all workers.

    Attributes:
        prompts: prompts asked, each `group` times.
        group: answers to each.
        prompt: tokens of a prompt.
        answer: tokens of an answer, with what it is told meanwhile.
        batch: answers an engine writes at a time.
    """

    prompts: int
    group: int
    prompt: int
    answer: int
    batch: int

    @property
    def answers(self) -> int:
        """Answers in all."""
        return self.prompts * self.group

    @property
    def tokens(self) -> int:
        """Tokens that are scored and learnt from: every answer after its prompt."""
        return self.answers * (self.prompt + self.answer)


def writing_seconds(config: Mapping[str, Any], asked: AnswerSet, hardware: Hardware, engines: int, dtype: str) -> float:
    """Seconds until `engines` have written a set; a group's prompt is computed once.

    Raises:
        RecipeError: bad config, or sizes that are not positive.
    """
    share = max(1, -(-asked.answers // engines))
    found = rates(
        config, hardware, batch=min(asked.batch, share), prompt=asked.prompt, answer=asked.answer, dtype=dtype
    )
    prompts = asked.prompts / engines * asked.prompt / found.prefill_tokens_per_second
    return prompts + share * asked.answer / found.decode_tokens_per_second


def scoring_seconds(
    scorers: Sequence[Mapping[str, Any]], asked: AnswerSet, hardware: Hardware, workers: int, precision_name: str
) -> float:
    """Seconds of one forward pass of every model of `scorers` over a set, cut over `workers`. Raises RecipeError."""
    length, mine = asked.prompt + asked.answer, asked.tokens / workers
    return sum(
        forward_seconds(c, mine, sequence_length=length, hardware=hardware, precision_name=precision_name)
        for c in scorers
    )


def set_flops(config: Mapping[str, Any], scorers: Sequence[Mapping[str, Any]], asked: AnswerSet) -> float:
    """FLOPs of writing and scoring a set."""
    length = asked.prompt + asked.answer
    written = asked.prompts * asked.prompt + asked.answers * asked.answer
    own = flops_per_token(config, length).forward * written
    return own + sum(flops_per_token(c, length).forward for c in scorers) * asked.tokens


def engine_bytes(config: Mapping[str, Any], asked: AnswerSet, kind: str, dtype: str) -> float:
    """Bytes an engine holds: weights, keys and values of its batch (on a CPU in fp32), and buffers."""
    return serving_memory(
        config, sequences=asked.batch, sequence_length=asked.prompt + asked.answer, dtype=dtype,
        kv_dtype="fp32" if kind == "cpu" else None, batch_tokens=256 if kind == "cpu" else 8192,
    ).peak  # fmt: skip


def weights_bytes(config: Mapping[str, Any]) -> float:
    """Bytes of a model's weights in fp32, in which models that score are held."""
    return 4.0 * count(parse(config)).total
